"""RMSNorm by one kernel forward and one backward, on the CPU of a machine that can compile them.

PyTorch has none for the CPU: LlamaRMSNorm reads and writes the tokens once for each of its elementwise operations.

Legend: T tokens, D model width, s sums of weight gradients.
"""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from remoe.experts.cpu.build import compiled_kernels
from remoe.models.kernels import is_bare, kernels_for

ROWS_OF_A_SUM = 64  # as in rowwise.cpp


class RMSNorm(LlamaRMSNorm):
    """y = w x / sqrt(mean(x^2) + eps), w (D,): LlamaRMSNorm, whose formula runs wherever the kernels do not."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), of x's dtype."""
        kernels = kernels_for(x, self.weight)
        if kernels is None:
            return super().forward(x)
        return _normed(x, None, self)[1]


def residual_norm(norm: nn.Module, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + added, or x, and the norm of that, with as few passes over the tokens as kernels allow.

    Args:
        norm: of (..., D).
        x, added: (..., D).
    """
    tensors = (x,) if added is None else (x, added)
    if is_bare(norm, RMSNorm) and kernels_for(*tensors, norm.weight) is not None:
        return _normed(x, added, norm)
    if added is not None:
        x = x + added
    return x, norm(x)


def _normed(x: Tensor, added: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    # Without gradients not by way of autograd, which takes longer than a token's norm.
    function = _RMSNormFunction.apply if torch.is_grad_enabled() else _RMSNormFunction.forward
    return function(x, added, norm.weight, norm.variance_epsilon)[:2]


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, added: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """s, which is x + added or x; y; and the factor 1 / sqrt(mean(s^2) + eps) of each token, (T,) float32."""
        given, weight_D, D = x.contiguous(), weight_D.contiguous(), x.shape[-1]
        s, more, place = x.view_as(x), 0, 0  # autograd takes no input as an output
        if added is not None:
            added, s = added.contiguous(), torch.empty_like(given)
            more, place = added.data_ptr(), s.data_ptr()
        T = x.numel() // D
        y, scale_T = torch.empty_like(given), x.new_empty(T, dtype=torch.float32)
        inputs, outputs = (given.data_ptr(), more, weight_D.data_ptr()), (place, y.data_ptr(), scale_T.data_ptr())
        compiled_kernels(x.dtype).rms_norm(*inputs, T, D, eps, *outputs)
        return s, y, scale_T

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, added, weight_D, ctx.eps = inputs
        ctx.save_for_backward(x if added is None else output[0], weight_D, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, ds: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        s, weight_D, scale_T = ctx.saved_tensors
        ds, dweight_D = (ds, None) if dy is None else _gradients(ctx, s, weight_D, scale_T, ds, dy)
        return ds, ds if ctx.needs_input_grad[1] else None, dweight_D, None


def _gradients(
    ctx, s: Tensor, weight_D: Tensor, scale_T: Tensor, ds: Tensor | None, dy: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of s, to which `ds` is added, and of the weight."""
    if torch.is_grad_enabled():  # create_graph: gradients of the gradients come from the formula
        norm = LlamaRMSNorm(s.shape[-1], ctx.eps)
        y = torch.func.functional_call(norm, {"weight": weight_D}, (s,))
        needed = [tensor for tensor in (s, weight_D) if tensor.requires_grad]
        gradients = dict(zip(map(id, needed), torch.autograd.grad(y, needed, dy, create_graph=True), strict=True))
        dnorm, dweight_D = gradients.get(id(s)), gradients.get(id(weight_D))
        return dnorm if ds is None or dnorm is None else ds + dnorm, dweight_D
    dy, s, weight_D = dy.contiguous(), s.contiguous(), weight_D.contiguous()
    other = None if ds is None else ds.contiguous()
    T, D = len(scale_T), s.shape[-1]
    dx, dweight_sD = torch.empty_like(s), s.new_empty(-(-T // ROWS_OF_A_SUM), D, dtype=torch.float32)
    addresses = (tensor.data_ptr() for tensor in (dy, s, weight_D, scale_T))
    elsewhere = 0 if other is None else other.data_ptr()
    compiled_kernels(s.dtype).rms_norm_backward(*addresses, elsewhere, T, D, dx.data_ptr(), dweight_sD.data_ptr())
    return dx, dweight_sD.sum(dim=0).to(weight_D.dtype)
