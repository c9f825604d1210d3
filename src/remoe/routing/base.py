"""What every router shares: its interface, its shape checks and its logits in float32.

Legend: T tokens, D model width, E experts.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.errors import check, check_integers
from remoe.matmul import float32_linear
from remoe.routing.assignment import Routing
from remoe.routing.float32 import Float32State
from remoe.routing.regularizers import closed_distance, closed_loss, starved_loss

STARVED_COEF = 0.008  # of `starved_loss`, per layer and k/E, in units of the task's loss


def scaled_load(counted_E1: Tensor, num_tokens: Tensor) -> Tensor:
    """(E,) float32: the tokens of each expert among `num_tokens`, from those among all that were counted."""
    return counted_E1[:-1] * (num_tokens / counted_E1[-1].clamp(min=1))


def split_by_granularity(num_experts: int, d_ffn: int, k: int, granularity: int) -> tuple[int, int, int]:
    """Experts, width of each, and target experts per token, after granularity G has split every expert into G."""
    E, G = num_experts, granularity
    return E * G, d_ffn // G, k * G  # Eq. 12 and 13: E G experts of width d_ffn / G, k G of them active


class GateRule(NamedTuple):
    """How the gates of a router follow from x at evaluation, for kernels that compute them with the experts.

    Attributes:
        kind: with logits = x W^T + bias: "relu", scale * each_E * ReLU(logits); "softmax", scale times the k largest
            probabilities; "sigmoid", scale times sigmoid(logits) where sigmoid(logits) + each_E is among the k largest;
            "cutoff", sigmoid(logits) where it lies above each_E, everywhere with k = E.
        weight_ED: W, (E, D).
        bias_E: (E,), or None for none.
        each_E: (E,), one number for each expert, or None where the kind needs none.
        k: experts per token.
        scale: factor on the gates.
        renormalize: divide a token's gates by the sum of the chosen probabilities or sigmoids.
    """

    kind: str
    weight_ED: Tensor
    bias_E: Tensor | None
    each_E: Tensor | None
    k: int
    scale: float = 1.0
    renormalize: bool = False


class Router(Float32State, ABC):
    """Turns tokens into a `Routing`. What the rest of the package must know of a router are attributes of its class.

    Args:
        d_model: D.
        num_experts: E, after the split by granularity.
        k: target experts per token, 1 <= k <= E, after that split.

    Attributes:
        steered: lambda of the sparsity controller multiplies the regulariser; otherwise a constant coefficient does.
        routes_pairs: tokens go to some of several experts; otherwise all go through one network.
        merges: that network is merged from all experts' weights; the router returns a `MergedRouting`.
        has_logits: the router computes E logits per token, which its FLOPs count.
        needs_ids: the router needs token ids.
        needs_documents: where documents are packed into one sequence, `forward` is passed `document_T`, (T,) int64: the
            document of its sequence that each token is in.
        supports_cache: a token's routing needs no more of the past than a KV cache holds.
        causal: at evaluation no token's routing depends on a later token.
        looks_ahead: in training it does, at least in some steps: the training loss does not compare.
        global_load: in training, losses balance the load of the step's tokens so far, those of `earlier_load` included,
            of all ranks of torch.distributed, scaled to as many tokens as the pass has. All ranks must then run the
            router equally often. Set on an instance; otherwise each pass balances its own load.
        earlier_load: (E + 1,) int64, tokens of each expert, and all tokens, in the step's earlier micro-batches on this
            rank; None for none. `SparsityController.carry_load` sets it.

        opens: in training, a steered router also returns `Routing.closed_loss`, with which the smooth rule of
            `SparsityController` opens experts, and adds to `extra_loss` what lifts experts that hardly get tokens. The
            controller sets it on its routers.

    Raises:
        ConfigError: when k is not in 1..E.
    """

    steered = False
    routes_pairs = True
    has_logits = True
    needs_ids = False
    needs_documents = False
    supports_cache = True
    causal = True
    looks_ahead = False
    merges = False
    global_load = False
    earlier_load: Tensor | None = None
    opens = False

    def __init__(self, d_model: int, num_experts: int, k: int) -> None:
        super().__init__()
        check_integers(1, d_model=d_model, num_experts=num_experts, k=k)
        check(1 <= k <= num_experts, f"k must be between 1 and E, but k = {k} and E = {num_experts}")
        self.d_model, self.num_experts, self.k = d_model, num_experts, k

    @classmethod
    def networks(cls, num_experts: int, d_ffn: int, k: int) -> tuple[int, int]:
        """How many expert networks a layer has, and the width of each, for E experts of width d_ffn."""
        return num_experts, d_ffn

    @classmethod
    def executed_experts(cls, num_experts: int, k: int, density: float, seq_len: int, **options: Any) -> float:
        """What the experts cost per token, in experts of width d_ffn.

        Args:
            num_experts, k: E and k before the split by granularity.
            density: share of the (token, expert) pairs that are executed, 1 - S.
            seq_len: tokens of a sequence.
            options: of the router, those that were given.
        """
        return density * num_experts

    @abstractmethod
    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, *, ids_T: Tensor | None = None, seq_len: int | None = None
    ) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, D), sequences one after the other.
            mask_T: (T,) bool, false for padding, which is in no pair and in no statistic.
            ids_T: (T,) int64 token ids, for routers that need them.
            seq_len: tokens of a sequence, a divisor of T; T when None. For routers that look at neighbouring tokens.
        """

    def gates(self, x_TD: Tensor) -> Tensor | None:
        """(T, E) gates of `forward` at evaluation, zero where there is no pair; None where only `forward` knows."""
        return None

    def gate_rule(self) -> GateRule | None:
        """The rule of `gates`; None where it is none of those that kernels know."""
        return None

    def counted(self, active_TE: Tensor, num_tokens: Tensor) -> Tensor:
        """(E + 1,) int64, tokens of each expert and all tokens, from which losses take the load; see `global_load`."""
        counted_E1 = torch.cat((active_TE.sum(dim=0), num_tokens.reshape(1)))
        if not (self.global_load and self.training):
            return counted_E1
        if self.earlier_load is not None:
            counted_E1 = counted_E1 + self.earlier_load
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counted_E1)
        return counted_E1

    def load(self, active_TE: Tensor, num_tokens: Tensor) -> Tensor:
        """(E,) float32, `counted` for as many tokens as the pass has."""
        return scaled_load(self.counted(active_TE, num_tokens), num_tokens)

    def reset_parameters(self, std: float) -> None:
        """Draws new weights from a normal distribution of this standard deviation; scales start at their own value."""

    def reset_state(self) -> None:
        """Sets the state that `update_state` moves to its start, by torch's initialisers."""

    def update_state(self, load_E: Tensor, statistic_E: Tensor) -> None:
        """Moves state that is not learned by gradients, once per optimiser step.

        Args:
            load_E: (E,) float32, share of the step's tokens that each expert got.
            statistic_E: (E,) float32, mean of `Routing.statistic_E` over the step's forward passes.
        """

    @torch.no_grad()
    def step(self, load_E: Tensor, statistic_E: Tensor, seen: Tensor) -> None:
        """`update_state`, but without effect where no token was seen (0-dim bool). No host synchronisation."""
        before = [buffer.clone() for buffer in self.buffers()]
        device = before[0].device if before else seen.device  # a model's layers may lie on several
        load_E, statistic_E, seen = load_E.to(device), statistic_E.to(device), seen.to(device)
        self.update_state(load_E, statistic_E)
        for buffer, old in zip(self.buffers(), before, strict=True):
            buffer.copy_(torch.where(seen, buffer, old))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, k={self.k}"


class LinearRouter(Router):
    """A router with one logit per expert: x W, or x W + b."""

    def __init__(self, d_model: int, num_experts: int, k: int, *, bias: bool = False) -> None:
        super().__init__(d_model, num_experts, k)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) router logits, float32 (float64 for float64 input), whatever autocast says."""
        return float32_linear(x_TD, self.weight, self.bias)

    def opening_losses(
        self, logits_TE: Tensor, counted_E1: Tensor | None, num_tokens: Tensor, mask_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """0-dim each, or None where not needed: `Routing.closed_loss`, and what lifts starved experts, weighted.

        See `opens`. `counted_E1` is `counted`, or None where the penalty is not balanced: then all experts are opened
        alike, and none is lifted.
        """
        if not (self.opens and self.training):
            return None, None
        if mask_T is not None:
            logits_TE = logits_TE.masked_fill(~mask_T[:, None], 0)
        distance_E = closed_distance(logits_TE, num_tokens=num_tokens)
        if counted_E1 is None:
            return distance_E.sum(), None
        k, count_E, counted = self.k, counted_E1[:-1], counted_E1[-1]
        closed = closed_loss(distance_E, count_E, k=k, num_tokens=counted)
        starved = starved_loss(distance_E, count_E, k=k, num_tokens=counted)
        return closed, STARVED_COEF * k / self.num_experts * starved

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
