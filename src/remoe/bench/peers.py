"""Other implementations of a mixture-of-experts layer, as modules from (T, D) to (T, D); only those that are installed.

Legend: T tokens, D model width, F expert width, E experts, k experts per token.
"""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn


class Size(Protocol):
    """The sizes of a layer."""

    D: int
    F: int
    E: int
    k: int


class _Sequence(nn.Module):
    """A block over (B, S, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]


def peer_layers(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers of others with TopK routing, by name, their router included."""
    layers = {f"transformers {name}": mixtral_layer(size, name) for name in ("eager", "grouped_mm")}
    if device.type == "cuda" and find_spec("scattermoe"):
        layers["scattermoe"] = _ScatterMoE(size)
    return layers


class _ScatterMoE(nn.Module):
    """scattermoe's SwiGLU experts behind a softmax router; it takes exactly k experts per token. CUDA only."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP

        self.k = size.k
        self.router = nn.Linear(size.D, size.E, bias=False)
        self.experts = GLUMLP(size.D, size.F, size.E, size.k, bias=False, activation=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        gate_TK, expert_TK = self.router(x).float().softmax(dim=1).topk(self.k, dim=1)
        return self.experts(x, gate_TK.to(x.dtype), expert_TK)


def mixtral_layer(size: Size, implementation: str) -> nn.Module:
    """transformers' Mixtral block with normally distributed weights.

    Args:
        size: D, F, E, k.
        implementation: a name in transformers' experts interface, such as "eager", "grouped_mm" or "batched_mm".
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.D,
        intermediate_size=size.F,
        num_local_experts=size.E,
        num_experts_per_tok=size.k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return _Sequence(block)
