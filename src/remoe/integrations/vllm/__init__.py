"""Our language models in vLLM (0.32): a plugin, the routing function of its fused experts, and the names of weights.

vLLM finds `register` by the entry point of this package. What needs vLLM itself is in `model.py`.

Legend: T tokens, D model width, F expert width, E experts, c slots of a token.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from remoe.errors import ConfigError
from remoe.models.configuration_remoe import RemoeConfig
from remoe.routing import Router

ARCHITECTURE = "RemoeForCausalLM"
SHARED = ".shared_expert.gate_up_proj"


def register() -> None:
    """Makes vLLM know our configuration and our model; vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    from remoe.integrations.auto import register_config

    register_config()
    # By name: importing the model here would start CUDA in processes that must not.
    ModelRegistry.register_model(ARCHITECTURE, "remoe.integrations.vllm.model:RemoeForCausalLM")


def largest_gates(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A token's experts with the largest gates, as vLLM's `custom_routing_function`.

    Args:
        hidden_states: (T, D), not used.
        gating_output: (T, E) gates, zero where there is no pair.
        topk: c.
        renormalize: must be false: gates are weights as they are.

    Returns:
        (T, c) float32 gates, and (T, c) int32 experts. A slot that a token does not use has the gate 0 and the token's
        first expert, so that no further weights are read for it.

    Raises:
        ConfigError: where the gates are to be renormalised.
    """
    if renormalize:
        raise ConfigError("gates of ReLU routing must not be renormalised")
    index_Tc = gating_output.abs().topk(topk, dim=1).indices
    weight_Tc = gating_output.gather(1, index_Tc)
    index_Tc = index_Tc.where(weight_Tc != 0, index_Tc[:, :1])
    return weight_Tc.float(), index_Tc.int()


def gates_of(router: Router, x_TD: Tensor) -> Tensor:
    """(T, E) gates of a router at evaluation, zero where there is no pair."""
    gate_TE = router.gates(x_TD)
    return router(x_TD).gate_TE if gate_TE is None else gate_TE


def slots(config: RemoeConfig, router: Router) -> int:
    """c: the most experts of a token by the model's or the router's cap; E without a cap."""
    E = router.num_experts
    return min(config.max_experts or E, getattr(router, "cap", None) or E)


def check_config(config: RemoeConfig, router: Router) -> None:
    """Raises ConfigError for models that vLLM would not compute as we do."""
    if not router.routes_pairs or router.needs_ids or not router.causal:
        raise ConfigError(
            f"router {config.router!r} needs more than a token's own state, which is all that vLLM gives it"
        )
    if config.expert_bits is not None:
        raise ConfigError("vLLM does not know weights in 4 bits: export the model without --quantize")
    if config.qk_norm and config.attention_bias:
        raise ConfigError("vLLM's attention with qk_norm has no attention_bias")


def vllm_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of our checkpoints under the names that the loader of the vLLM model knows.

    Routed experts keep names and layout: vLLM takes `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F) as they are.
    A shared expert becomes three matrices. The sparsity controller's state is left out, because it serves training.

    Args:
        weights: names and tensors of a checkpoint.
    """
    for name, weight in weights:
        if name.startswith("sparsity."):
            continue
        if name.endswith(SHARED):
            prefix = name.removesuffix("gate_up_proj")
            for part, rows_FD in zip(("gate_proj", "up_proj"), weight[0].chunk(2), strict=True):
                yield f"{prefix}{part}.weight", rows_FD
        elif name.endswith(".shared_expert.down_proj"):
            yield f"{name}.weight", weight[0]
        else:
            yield name, weight
