"""Matrix products: on the CPU by the faster of the two libraries that PyTorch carries, and in float32 of 16-bit tokens.

PyTorch sends float32 products to MKL, which on processors that are not Intel's stays with AVX2 even where they have
AVX-512. oneDNN, in the same build, does not: on an AMD EPYC with AVX-512 its products run about twice as fast. The
choice is a function of the machine and not of a measurement, so that two runs on it agree bit for bit.

`torch.backends.mkldnn.enabled = False` switches it off.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST_WORK = 2**22  # multiplications; below them a call of oneDNN costs more than it saves


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b, (M, N). Differentiate it yourself: autograd does not know every library's product.

    The second operand may be a transposed view at no cost; of the first one, a transposed view is copied.
    """
    if prefers_onednn(a_MK, b_KN.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    return torch.mm(a_MK, b_KN)


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Adds `product(a, b)` to a sum, which may have more digits than the factors."""
    if sum_MN.dtype is not a_MK.dtype or prefers_onednn(a_MK, b_KN.shape[1]):
        sum_MN += product(a_MK, b_KN)
    else:
        sum_MN.addmm_(a_MK, b_KN)


class Linear(nn.Linear):
    """`nn.Linear` by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), as nn.Linear."""
        return linear(x, self.weight) if self.bias is None else super().forward(x)


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, (..., K) to (..., N), by `product`."""
    plain = type(weight_NK) in (Tensor, nn.Parameter)  # quantised and distributed weights have products of their own
    if plain and weight_NK.dtype is x.dtype and prefers_onednn(x, weight_NK.shape[0]):
        return _LinearFunction.apply(x, weight_NK)
    return F.linear(x, weight_NK)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_NK: Tensor) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_MK, weight_NK)
        return product(x_MK, weight_NK.t()).view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        dy_MN = dy.reshape(-1, dy.shape[-1])
        dx = product(dy_MN, weight_NK).view(*dy.shape[:-1], weight_NK.shape[1]) if ctx.needs_input_grad[0] else None
        dweight_NK = product(dy_MN.t(), x_MK) if ctx.needs_input_grad[1] else None
        return dx, dweight_NK


def joined_linear(x: Tensor, *weights: Tensor) -> Tensor:
    """(..., K) to (..., N): x W^T of several (N_i, K) side by side, N their sum, by one `product`."""
    return _JoinedFunction.apply(x, *weights)


class _JoinedFunction(torch.autograd.Function):
    # The joined weights are not kept for the backward pass: to join them again costs less than the memory.
    @staticmethod
    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        joined_NK = torch.cat(weights)
        return product(x.reshape(-1, x.shape[-1]), joined_NK.t()).view(*x.shape[:-1], len(joined_NK))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        multiply = torch.mm if torch.is_grad_enabled() else product  # create_graph: by what autograd knows
        dy_MN, x_MK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = multiply(dy_MN, torch.cat(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *(None,) * len(weights)
        return dx, *multiply(dy_MN.t(), x_MK).split([len(weight) for weight in weights])


def prefers_onednn(x: Tensor, columns: int) -> bool:
    """Whether the product of x and a matrix of so many columns is oneDNN's: float32, no autocast, where it pays."""
    return (
        not torch.compiler.is_compiling()  # the compiler has its own choice of libraries; sizes may be symbols
        and x.dtype is torch.float32
        and x.numel() * columns >= LEAST_WORK
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return Path("/proc/cpuinfo").exists() and not is_intel()


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's; False where the system does not say (it has no /proc/cpuinfo)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (Intel's AMX); False where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " amx_bf16 " in cpuinfo.read_text()


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and from a multiple of 16 bytes on: GPUs read in such units, and a view may start anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def float32_linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """x W^T + b, (T, E), in float32 (float64 for float64 input), whatever autocast says."""
    device = x_TD.device.type
    if x_TD.dtype == weight_ED.dtype == torch.float32 and not torch.is_autocast_enabled(device):
        return F.linear(x_TD, weight_ED, bias_E)  # entering a context takes longer than a few tokens' logits
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        bias_E = None if bias_E is None else bias_E.to(dtype)
        if x_TD.dtype == dtype:
            return F.linear(x_TD, weight_ED.to(dtype), bias_E)
        y_TE = _Float32Product.apply(x_TD, weight_ED)
        return y_TE if bias_E is None else y_TE + bias_E


class _Float32Product(torch.autograd.Function):
    """x W^T in float32 of 16-bit tokens, which are kept for the backward pass as they are, not as float32.

    A GPU multiplies bfloat16 by bfloat16 exactly and sums in float32; the gradient of the logits, which has more
    digits, goes through it as the sum of two bfloat16 numbers, which leaves out 1 part in 2^17.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.in_bfloat16 = x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16
        if ctx.in_bfloat16:
            return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
        return x_TD.float() @ weight_ED.float().t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        dx, dweight = ctx.needs_input_grad
        if ctx.in_bfloat16:
            high_TE = dlogits_TE.bfloat16()
            parts_T2E = torch.cat((high_TE, (dlogits_TE - high_TE).bfloat16()), dim=1)
            dx_TD = parts_T2E @ weight_ED.repeat(2, 1) if dx else None
            if not dweight:
                return dx_TD, None
            dweight_2ED = torch.mm(parts_T2E.t(), x_TD, out_dtype=torch.float32).unflatten(0, (2, -1))
            return dx_TD, dweight_2ED.sum(dim=0).bfloat16()
        dx_TD = (dlogits_TE @ weight_ED.float()).to(x_TD.dtype) if dx else None
        return dx_TD, (dlogits_TE.t() @ x_TD.float()).to(weight_ED.dtype) if dweight else None
