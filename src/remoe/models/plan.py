"""What a model will cost, before it exists: parameters, FLOPs and memory, from a model on the meta device.

Legend: B batch, S sequence, D model width, F expert width, L layers, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from remoe.experts import STORED_RATIO
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM


@dataclass(frozen=True)
class Plan:
    """Figures of one model.

    Attributes:
        total_parameters: all weights.
        active_parameters: weights that a token meets on average at target sparsity.
        flops_per_sequence: forward and backward of one sequence at target sparsity.
        dense_stage_flops_per_sequence: the same while random weights activate half of the experts.
        state_bytes: float32 weights, gradients and both AdamW moments.
        activation_bytes: stored for the backward pass of one micro-batch, at target sparsity, without recomputation.
        dense_stage_activation_bytes: the same while half of the experts are active.
    """

    total_parameters: int
    active_parameters: int
    flops_per_sequence: float
    dense_stage_flops_per_sequence: float
    state_bytes: int
    activation_bytes: int
    dense_stage_activation_bytes: int


def plan(config: RemoeConfig, seq_len: int, micro_batch_size: int) -> Plan:
    """Plans a model.

    Args:
        config: the model.
        seq_len: S.
        micro_batch_size: sequences per forward and backward pass, for the activations.
    """
    total, active = parameters(config)
    density = _target_density(config)
    dense_stage = max(density, 0.5) if config.steered else density
    activations = [_activation_bytes(config, seq_len, micro_batch_size, d) for d in (density, dense_stage)]
    return Plan(
        total_parameters=total,
        active_parameters=active,
        flops_per_sequence=flops_per_sequence(config, seq_len, density),
        dense_stage_flops_per_sequence=flops_per_sequence(config, seq_len, dense_stage),
        state_bytes=16 * total,
        activation_bytes=activations[0],
        dense_stage_activation_bytes=activations[1],
    )


def parameters(config: RemoeConfig) -> tuple[int, int]:
    """All weights, and those that a token meets on average at target sparsity."""
    with torch.device("meta"):
        model = RemoeForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    return total, round(total - experts * (1 - _target_density(config)))


def _target_density(config: RemoeConfig) -> float:
    return config.k / config.num_experts if config.routes_pairs else 1.0


def executed_experts(config: RemoeConfig, seq_len: int, density: float) -> float:
    """What a token's experts cost, in experts of `intermediate_size`.

    Args:
        config: the model.
        seq_len: S.
        density: share of the (token, expert) pairs that are executed, 1 - S; where there are no pairs it plays no part.
    """
    options = config.router_options or {}
    return config.router_class.executed_experts(config.num_experts, config.k, density, seq_len, **options)


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
    per_token = (flops_per_sequence(config, seq_len, 1 - s) / seq_len for s in sparsities)
    return step_tokens * sum(router + flops for flops in per_token)


def flops_per_sequence(config: RemoeConfig, seq_len: int, density: float) -> float:
    """Forward and backward FLOPs of one sequence (arXiv 2412.14711, appendix; router and norms left out).

    For F = 4 D it is 12 S L D^2 ((1 + g/a + S/D) + 6 k + V / (2 L D)), with g KV groups and a heads. Attention counts
    all S^2 pairs, as the paper does.

    Args:
        config: the model.
        seq_len: S.
        density: share of the (token, expert) pairs that are executed, 1 - S; where there are no pairs it plays no part.
    """
    S, D, L = seq_len, config.hidden_size, config.num_hidden_layers
    width = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads / config.num_attention_heads
    projections = 2 * D * width * (1 + groups)
    attention = 2 * S * width
    experts = executed_experts(config, seq_len, density)
    feed_forward = 3 * D * (config.intermediate_size * experts + config.shared_expert_size)
    per_token = L * (projections + attention + feed_forward) + D * config.vocab_size
    return 6.0 * S * per_token  # a multiply and an add, forward once and backward twice


def _activation_bytes(config: RemoeConfig, seq_len: int, micro_batch_size: int, density: float) -> int:
    """Bytes that the forward pass stores for the backward pass, in float32, counted on fake tensors.

    A fake tensor has no values, so a routed model would have no pairs. Everything but its experts is counted on the
    dense model with experts of width 1, and what the experts store is added: 2F pre-activations for as many pairs as
    `STORED_RATIO` allows, the gate and the index of every pair.
    """
    if not config.routes_pairs:
        return _stored_bytes(config, seq_len, micro_batch_size)
    changes = {"router": "dense", "router_options": None}
    changes |= {"num_experts_per_tok": 1, "granularity": 1, "intermediate_size": 1}
    skeleton = RemoeConfig(**{**config.to_diff_dict(), **changes})
    pairs = micro_batch_size * seq_len * density * config.experts_per_layer
    target = micro_batch_size * seq_len * config.active_per_token
    pre_activations = min(pairs, STORED_RATIO * target) * 4 * 2 * config.intermediate_size // config.granularity
    experts = config.num_hidden_layers * (pre_activations + pairs * (4 + 8))
    return round(_stored_bytes(skeleton, seq_len, micro_batch_size) + experts)


def _stored_bytes(config: RemoeConfig, seq_len: int, micro_batch_size: int) -> int:
    stored: dict[int, torch.UntypedStorage] = {}  # holds each storage, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():  # takes the same kernels as real tensors, fused attention above all, and no memory
        model = RemoeForCausalLM(config).train()
        token_BS = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(token_BS, labels=token_BS, use_cache=False)
    return sum(storage.nbytes() for storage in stored.values())
