"""RMSNorm by one kernel forward and one backward, on the CPU of a machine that can compile them.

PyTorch has none for the CPU: LlamaRMSNorm reads and writes the tokens once for each of its elementwise operations.

Legend: T tokens, D model width, s sums of weight gradients.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from remoe.experts.cpu.build import compiled_kernels
from remoe.models.kernels import kernels_for

ROWS_OF_A_SUM = 64  # as in rowwise.cpp


class RMSNorm(LlamaRMSNorm):
    """y = w x / sqrt(mean(x^2) + eps), w (D,): LlamaRMSNorm, whose formula runs wherever the kernels do not."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), of x's dtype."""
        kernels = kernels_for(x, self.weight)
        if kernels is None:
            return super().forward(x)
        # Without gradients not by way of autograd, which takes longer than a token's norm.
        norm = _RMSNormFunction.apply if torch.is_grad_enabled() else _RMSNormFunction.forward
        return norm(x, self.weight, self.variance_epsilon)[0]


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """y, and the factor 1 / sqrt(mean(x^2) + eps) of each token, (T,) float32."""
        x, weight_D, D = x.contiguous(), weight_D.contiguous(), x.shape[-1]
        T = x.numel() // D
        y, scale_T = torch.empty_like(x), x.new_empty(T, dtype=torch.float32)
        outputs = y.data_ptr(), scale_T.data_ptr()
        compiled_kernels(x.dtype).rms_norm(x.data_ptr(), weight_D.data_ptr(), T, D, eps, *outputs)
        return y, scale_T

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, weight_D, ctx.eps = inputs
        ctx.save_for_backward(x, weight_D, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale_T = ctx.saved_tensors
        if dy is None:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph: gradients of the gradients come from the formula
            norm = LlamaRMSNorm(x.shape[-1], ctx.eps)
            y = torch.func.functional_call(norm, {"weight": weight_D}, (x,))
            needed = [tensor for tensor, needs in zip((x, weight_D), ctx.needs_input_grad, strict=False) if needs]
            gradients = iter(torch.autograd.grad(y, needed, dy, create_graph=True))
            return *(next(gradients) if needs else None for needs in ctx.needs_input_grad[:2]), None
        dy, x, weight_D = dy.contiguous(), x.contiguous(), weight_D.contiguous()
        T, D = len(scale_T), x.shape[-1]
        dx, dweight_sD = torch.empty_like(x), x.new_empty(-(-T // ROWS_OF_A_SUM), D, dtype=torch.float32)
        addresses = (tensor.data_ptr() for tensor in (dy, x, weight_D, scale_T))
        compiled_kernels(x.dtype).rms_norm_backward(*addresses, T, D, dx.data_ptr(), dweight_sD.data_ptr())
        return dx, dweight_sD.sum(dim=0).to(weight_D.dtype), None
