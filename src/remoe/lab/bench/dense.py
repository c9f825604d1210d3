"""The dense layers that a mixture is compared with, in every way in which PyTorch computes them on the machine.

Legend: D model width, F width of the layer, N rows of an input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DENSE = "dense"  # by nn.Linear


class DenseLayer(nn.Module):
    """The SwiGLU feed-forward layer of LLaMA: with width k F the same active FLOPs, without routing."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OneDnnLayer(DenseLayer):
    """The same layer by the products of oneDNN, which PyTorch contains beside MKL."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(_OneDnnLinear.apply(x, self.gate_proj.weight)) * _OneDnnLinear.apply(x, self.up_proj.weight)
        return _OneDnnLinear.apply(hidden, self.down_proj.weight)


def dense_layers(d_model: int, width: int, dtype: torch.dtype, compiled: bool) -> dict[str, type | object]:
    """Constructors of the dense layers that can run, by name: nn.Linear first, then oneDNN, then torch.compile.

    Args:
        d_model: D.
        width: F.
        dtype: of the weights. PyTorch's bfloat16 products on a CPU are oneDNN's already.
        compiled: whether to include torch.compile, which takes seconds for every size.
    """
    layers = {DENSE: lambda: DenseLayer(d_model, width)}
    on_cpu = torch.empty(0).device.type == "cpu"  # the default device
    if on_cpu and dtype is torch.float32 and has_onednn():
        layers["dense oneDNN"] = lambda: OneDnnLayer(d_model, width)
    if compiled:
        layers["dense compiled"] = lambda: torch.compile(DenseLayer(d_model, width), dynamic=False)
    return layers


def has_onednn() -> bool:
    """Whether this PyTorch can be made to compute a float32 product by oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b, (M, N), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        return onednn_product(x_ND, weight_FD.t())

    @staticmethod
    def backward(ctx, dy_NF: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_FD = ctx.saved_tensors
        return onednn_product(dy_NF, weight_FD), onednn_product(dy_NF.t(), x_ND)
