"""What a model of a `RemoeConfig` costs: `remoe.costs` for any router, also one of a user's own."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from remoe import costs
from remoe.costs import ModelSizes, Plan
from remoe.models.configuration_remoe import RemoeConfig
from remoe.routing import build_router


def sizes_of(config: RemoeConfig) -> ModelSizes:
    """The sizes of a model; the attributes and the weights of its router are those of the router's class."""
    D, E, K = config.hidden_size, config.experts_per_layer, config.active_per_token
    options: dict[str, Any] = config.router_options or {}
    router, known = config.router_class, costs.ROUTER_SIZES.get(config.router, costs.RouterSizes())
    with torch.device("meta"):
        shapes = tuple(tuple(p.shape) for p in build_router(config.router, D, E, K, **options).parameters())
    networks, width = router.networks(E, config.intermediate_size // config.granularity, K)
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return ModelSizes(
        vocab_size=config.vocab_size,
        d_model=D,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        d_ffn=config.intermediate_size,
        num_experts=config.num_experts,
        k=config.k,
        granularity=config.granularity,
        shared=config.shared_expert_size,
        networks=networks,
        expert_width=networks * width,
        router_shapes=shapes,
        executed_experts=partial(_executed, config),
        steered=config.steered,
        routes_pairs=config.routes_pairs,
        merges=router.merges,
        balances=known.balances and options.get("load_balance") is not False,
        qk_norm=config.qk_norm,
        tied=config.tie_word_embeddings,
        segment=options.get("segment", costs.SEGMENT),
        others=config.num_hidden_layers * (q + 2 * kv + D) * config.attention_bias,
    )


def _executed(config: RemoeConfig, density: float, seq_len: int) -> float:
    options = config.router_options or {}
    return config.router_class.executed_experts(config.num_experts, config.k, density, seq_len, **options)


def plan(config: RemoeConfig, seq_len: int, micro_batch_size: int, *, norm_kernels: bool = False) -> Plan:
    """`remoe.costs.plan` of a model."""
    return costs.plan(sizes_of(config), seq_len, micro_batch_size, norm_kernels=norm_kernels)


def parameters(config: RemoeConfig) -> tuple[int, int]:
    """All weights, and those that a token meets on average at target sparsity."""
    return costs.parameters(sizes_of(config))


def flops_per_sequence(config: RemoeConfig, seq_len: int, density: float) -> float:
    """`remoe.costs.flops_per_sequence` of a model."""
    return costs.flops_per_sequence(sizes_of(config), seq_len, density)


def training_flops(config: RemoeConfig, seq_len: int, step_tokens: int, sparsities: Sequence[float]) -> float:
    """FLOPs of a training run from the pairs that were routed, its dense stage and the routers included.

    Recomputed activations do not count, as usual; `remoe compare` reports those of pairs beyond STORED_RATIO.

    Args:
        config: the model.
        seq_len: S.
        step_tokens: tokens of an optimiser step.
        sparsities: the measured S of each step, over all layers.
    """
    logits = config.experts_per_layer if config.router_class.has_logits else 0
    router = 6.0 * config.num_hidden_layers * config.hidden_size * logits
    if not config.routes_pairs:
        sparsities = [0.0] * len(sparsities)
    sizes = sizes_of(config)
    per_token = (costs.flops_per_sequence(sizes, seq_len, 1 - s) / seq_len for s in sparsities)
    return step_tokens * sum(router + flops for flops in per_token)
