"""Other implementations of a mixture-of-experts layer, as modules from (T, D) to (T, D), if they are installed.

Legend: T tokens, D model width, F expert width, E experts, k experts per token.
"""

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from remoe.models.configuration_remoe import RemoeConfig
from remoe.routing.base import LinearRouter

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM

# Options of a model that ours and Mixtral call by one name.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "router_aux_loss_coef", "num_experts_per_tok",
)  # fmt: skip


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


def peer_layers(size: Size, device: torch.device, relu: LinearRouter, slots: int) -> dict[str, nn.Module]:
    """The layers of other implementations with their routers, by name.

    Args:
        size: D, F, E, k.
        device: where they will run.
        relu: a ReLU router. Each implementation also runs its load, although it needs equally many experts per token.
        slots: the most experts that the ReLU router gives a token.
    """
    layers = {f"transformers {name}": mixtral_layer(size, name) for name in ("eager", "grouped_mm")}
    experts, absent = mixtral_layer(size, "grouped_mm").block.experts, None
    if hasattr(experts, "_is_expert_parallel"):  # then it can skip pairs with an expert that it does not have
        experts._is_expert_parallel, absent = True, size.E
    layers["grouped_mm, relu load"] = _Padded(relu, slots, experts, absent)
    others = {"scattermoe": _scattermoe_experts}
    if find_spec("grouped_gemm") and relu.weight.dtype == torch.bfloat16:  # which megablocks needs
        others["megablocks"] = _megablocks_experts
    for name, experts in others.items():
        if device.type == "cuda" and find_spec(name):
            layers[name] = _TopK(size, experts(size, size.k))
            layers[f"{name}, relu load"] = _Padded(relu, slots, experts(size, slots))
    return layers


class _Padded(nn.Module):
    """The load of a ReLU router on experts that need equally many of them for every token.

    Args:
        router: the ReLU router, which is copied.
        slots: number of experts per token; unused slots have gate zero.
        experts: called with (T, D) tokens, (T, slots) experts and (T, slots) gates.
        absent: number of the expert in unused slots, if `experts` has one that stands for none. By default it is an
            expert that the token does not have, computed and multiplied by zero.
    """

    def __init__(self, router: LinearRouter, slots: int, experts: nn.Module, absent: int | None = None) -> None:
        super().__init__()
        self.router, self.slots, self.experts, self.absent = copy.deepcopy(router), slots, experts, absent

    def forward(self, x: Tensor) -> Tensor:
        gate_TK, expert_TK = self.router.logits(x).relu().topk(self.slots, dim=1)
        if self.absent is not None:
            expert_TK = torch.where(gate_TK > 0, expert_TK, self.absent)
        return self.experts(x, expert_TK, gate_TK.to(x.dtype))


class _TopK(nn.Module):
    """A softmax router with experts that need exactly k of them for every token, called as those of `_Padded`."""

    def __init__(self, size: Size, experts: nn.Module) -> None:
        super().__init__()
        self.k, self.router, self.experts = size.k, nn.Linear(size.D, size.E, bias=False), experts

    def forward(self, x: Tensor) -> Tensor:
        gate_TK, expert_TK = self.router(x).float().softmax(dim=1).topk(self.k, dim=1)
        return self.experts(x, expert_TK, gate_TK.to(x.dtype))


def _scattermoe_experts(size: Size, k: int) -> nn.Module:
    from scattermoe.mlp import GLUMLP

    class Experts(GLUMLP):
        def forward(self, x: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
            return super().forward(x, gate_TK, expert_TK)

    return Experts(size.D, size.F, size.E, k, bias=False, activation=nn.SiLU())


def _megablocks_experts(size: Size, k: int) -> nn.Module:
    # Its grouped products: the block-sparse ones do not run with triton 3.2 and newer.
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    class Experts(ParallelDroplessMLP):
        def forward(self, x: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
            return self.grouped_forward_once(x, gate_TK, expert_TK)[0]

    return Experts(
        Arguments(
            hidden_size=size.D, ffn_hidden_size=size.F, moe_num_experts=size.E, moe_top_k=k, bias=False,
            activation_fn=nn.functional.silu, mlp_type="glu", mlp_impl="grouped", memory_optimized_mlp=True,
            fp16=False, bf16=True, device="cuda",
        )
    )  # fmt: skip


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


def mixtral_model(ours: RemoeConfig, implementation: str, **options: object) -> "MixtralForCausalLM":
    """transformers' Mixtral with the sizes of a model of ours.

    Args:
        ours: configuration of our model.
        implementation: a name in transformers' experts interface, such as "eager", "grouped_mm" or "batched_mm".
        options: further ones of MixtralConfig.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {name: getattr(ours, name) for name in _SHARED}
    config = MixtralConfig(
        **sizes, num_local_experts=ours.num_experts, experts_implementation=implementation, **options
    )
    model = MixtralForCausalLM(config)
    assert model.config._experts_implementation == implementation
    return model
