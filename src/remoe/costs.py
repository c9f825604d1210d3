"""What a model costs, from its sizes alone: parameters, FLOPs and memory. Needs no torch: `remoe plan` is quick.

Legend: B batch, S sequence, T = B S tokens, D model width, F expert width, E experts, L layers, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from remoe.errors import check

STORED_RATIO, SEGMENT = 1.25, 256  # those of `remoe.experts` and `remoe.routing.lory`, whose import takes seconds

_FLOAT, _INDEX = 4, 8  # bytes of a float32 and of an int64


@dataclass(frozen=True)
class RouterSizes:
    """What a router costs; the attributes of its class have the same names (see `remoe.routing.base.Router`).

    Attributes:
        has_weights: one vector of width D for each expert.
        has_scale: one number for each expert.
        balances: with its default options its loss takes the load of the experts (no attribute of the class).
        network: the layer's width in experts of width d_ffn: "all" E of them, or "active" k.
    """

    steered: bool = False
    routes_pairs: bool = True
    merges: bool = False
    has_weights: bool = True
    has_scale: bool = False
    balances: bool = False
    network: str = "all"


ROUTER_SIZES = {
    "relu": RouterSizes(steered=True, balances=True),
    "relu_norm": RouterSizes(steered=True, has_scale=True, balances=True),
    "relu_scaled": RouterSizes(steered=True, has_scale=True),
    "topk": RouterSizes(balances=True),
    "sigmoid": RouterSizes(),
    "sparsemixer": RouterSizes(balances=True),
    "expert_choice": RouterSizes(),
    "threshold": RouterSizes(),
    "hash": RouterSizes(has_weights=False),
    "lory": RouterSizes(routes_pairs=False, merges=True),
    "dense": RouterSizes(routes_pairs=False, has_weights=False, network="active"),
    "dense_wide": RouterSizes(routes_pairs=False, has_weights=False),
}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a language model.

    Attributes:
        d_ffn, num_experts, k: before the split by granularity G.
        networks: expert networks of a layer.
        expert_width: F summed over these.
        router_shapes: shapes of the parameters of a layer's router.
        executed_experts: (density, S) to the cost of a token's experts, in experts of width d_ffn.
        steered, routes_pairs, merges: of the router's class.
        balances: whether the load of the experts is in the loss.
        others: parameters that the rest does not count, such as biases.
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    d_ffn: int
    num_experts: int
    k: int
    granularity: int
    shared: int
    networks: int
    expert_width: int
    router_shapes: tuple[tuple[int, ...], ...]
    executed_experts: Callable[[float, int], float]
    steered: bool
    routes_pairs: bool
    merges: bool
    balances: bool = False
    qk_norm: bool = False
    tied: bool = False
    segment: int = SEGMENT
    others: int = 0

    @property
    def router_weights(self) -> int:
        """Parameters of a layer's router."""
        return sum(math.prod(shape) for shape in self.router_shapes)

    @property
    def target_density(self) -> float:
        """Share of the (token, expert) pairs that are executed at target sparsity."""
        return self.k / self.num_experts if self.routes_pairs else 1.0


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

    @property
    def training_bytes(self) -> int:
        """The most memory that training takes, in float32."""
        return self.state_bytes + self.dense_stage_activation_bytes


def check_sizes(*, num_experts: int, k: int, granularity: int, d_ffn: int, shared: int) -> None:
    """Raises ConfigError for sizes of a layer, before the split by granularity, that do not fit together."""
    check(1 <= k <= num_experts, f"k must be between 1 and the number of experts, but k = {k} and E = {num_experts}")
    check(
        granularity >= 1 and d_ffn % granularity == 0,
        f"granularity must divide the expert width {d_ffn}, but is {granularity}",
    )
    check(shared >= 0, f"shared_expert_size must not be negative, but is {shared}")
    check(d_ffn >= 1, f"intermediate_size must be at least 1, but is {d_ffn}")


def executed_experts(router: RouterSizes, num_experts: int, k: int) -> Callable[[float, int], float]:
    """`executed_experts` of the router's class as a function of density and S."""

    def cost(density: float, seq_len: int) -> float:
        if router.routes_pairs:
            return density * num_experts
        if router.merges:
            return 1 + num_experts * math.ceil(seq_len / SEGMENT) / seq_len  # the merged network, and the merging
        return k if router.network == "active" else num_experts

    return cost


def plan(m: ModelSizes, seq_len: int, micro_batch_size: int, *, norm_kernels: bool = False) -> Plan:
    """Plans a model.

    Args:
        m: its sizes.
        seq_len: S.
        micro_batch_size: B, sequences per forward and backward pass, for the activations.
        norm_kernels: as for `activation_bytes`.
    """
    total, active = parameters(m)
    density = m.target_density
    dense_stage = max(density, 0.5) if m.steered else density
    activations = [
        activation_bytes(m, seq_len, micro_batch_size, d, norm_kernels=norm_kernels) for d in (density, dense_stage)
    ]
    return Plan(
        total_parameters=total,
        active_parameters=active,
        flops_per_sequence=flops_per_sequence(m, seq_len, density),
        dense_stage_flops_per_sequence=flops_per_sequence(m, seq_len, dense_stage),
        state_bytes=4 * _FLOAT * total,
        activation_bytes=activations[0],
        dense_stage_activation_bytes=activations[1],
    )


def parameters(m: ModelSizes) -> tuple[int, int]:
    """All weights, and those that a token meets on average at target sparsity."""
    D = m.d_model
    attention = 2 * D * m.head_dim * (m.heads + m.groups) + 2 * m.head_dim * m.qk_norm
    experts = 3 * D * m.expert_width
    layer = attention + 2 * D + m.router_weights + experts + 3 * D * m.shared
    total = m.layers * layer + D + D * m.vocab_size * (1 if m.tied else 2) + m.others
    return total, round(total - m.layers * experts * (1 - m.target_density))


def flops_per_sequence(m: ModelSizes, seq_len: int, density: float) -> float:
    """Forward and backward FLOPs of one sequence (arXiv 2412.14711, appendix; router and norms left out).

    For F = 4 D it is 12 S L D^2 ((1 + g/a + S/D) + 6 k + V / (2 L D)), with g KV groups and a heads. Attention counts
    all S^2 pairs, as the paper does.

    Args:
        m: sizes of the model.
        seq_len: S.
        density: share of the (token, expert) pairs that are executed, 1 - S; where there are no pairs it plays no part.
    """
    S, D, L = seq_len, m.d_model, m.layers
    width = m.heads * m.head_dim
    projections = 2 * D * width * (1 + m.groups / m.heads)
    attention = 2 * S * width
    feed_forward = 3 * D * (m.d_ffn * m.executed_experts(density, seq_len) + m.shared)
    per_token = L * (projections + attention + feed_forward) + D * m.vocab_size
    return 6.0 * S * per_token  # a multiply and an add, forward once and backward twice


def activation_bytes(
    m: ModelSizes,
    seq_len: int,
    micro_batch_size: int,
    density: float,
    *,
    bfloat16: bool = False,
    norm_kernels: bool = False,
) -> int:
    """Bytes that the forward pass stores for the backward pass, without recomputation.

    These are what autograd saves: per layer and token the inputs of the norms, of the projections and of the attention,
    q, k, v and its output, the pre-activations of the experts; and the head's gradients, which the loss computes. Under
    bfloat16 autocast norms and router keep float32, each projection keeps a copy of its input, and all layers but the
    router keep a copy of their weights.

    Args:
        m: sizes of the model.
        seq_len: S.
        micro_batch_size: B.
        density: share of the (token, expert) pairs that are executed.
        bfloat16: under bfloat16 autocast; otherwise float32.
        norm_kernels: whether norms are the kernels of `remoe.models.norm`, which keep D numbers of a token fewer than
            the formula: on a CPU with compiled kernels.
    """
    S, D = seq_len, m.d_model
    T, E = micro_batch_size * S, m.num_experts * m.granularity
    q, kv = m.heads * m.head_dim, m.groups * m.head_dim
    number = 2 if bfloat16 else _FLOAT
    fewer = _FLOAT * D if norm_kernels else 0  # of each norm
    per_token = (
        (28 if bfloat16 else 24) * D - 2 * fewer + number * (2 * (q + kv) + 4 * m.shared) + _FLOAT * (m.heads + 2)
    )
    if m.qk_norm:
        per_token += _FLOAT * (2 * (q + kv) + m.heads + m.groups)
    layer = float(T * per_token)
    if m.routes_pairs:
        pairs, stored = T * E * density, STORED_RATIO * T * m.k * m.granularity
        layer += number * 2 * (m.d_ffn // m.granularity) * min(pairs, stored)
        layer += pairs * (_FLOAT + 2 * _INDEX) + T * E * (_FLOAT + 1)  # the list of the pairs; gates and mask
    elif m.merges:
        segments = micro_batch_size * math.ceil(S / m.segment)
        merged = 3 * D * m.d_ffn + m.segment * (4 * m.d_ffn + D)
        layer += number * (segments * merged - T * D)
    else:
        layer += number * T * 4 * m.expert_width
    if bfloat16:
        layer += number * (2 * D * (q + kv) + 3 * D * (m.expert_width + m.shared))
    rotary = 2 * _FLOAT * S * m.head_dim
    loss = _FLOAT * D * m.vocab_size
    last = T * ((2 * _FLOAT + number) * D - fewer + _FLOAT)  # the final norm, and the gradient of what it gives
    return round(m.layers * layer + last + rotary + loss + _INDEX * T)
