"""Routing that is given instead of computed: the pairs of another engine or of an earlier pass.

Reinforcement learning samples with one program and trains with another. Rounding makes their routers differ on some
tokens; with the sampler's pairs, training uses the experts that sampling used.

Legend: L layers, T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.errors import ConfigError, check
from remoe.routing.assignment import Assignment, Routing, tree, unmasked
from remoe.routing.relu import ReLURouter
from remoe.routing.topk import TopKRouter


@dataclass(frozen=True)
class Replay:
    """The pairs that each layer is to execute, and with which gates.

    Attributes:
        active_LTE: for each layer (T, E) bool, the pairs. T are all tokens of a batch, row after row.
        gate_LTE: for each layer (T, E) float32, their gates, which are then constants without gradient; None to have
            the router compute the gates of the given pairs.
        known_T: (T,) bool, false for tokens without a record, which the router routes by itself; None for all known.
    """

    active_LTE: Sequence[Tensor]
    gate_LTE: Sequence[Tensor] | None = None
    known_T: Tensor | None = None

    @classmethod
    def of(cls, routings: Sequence[Routing], *, keep_gates: bool = False) -> "Replay":
        """The routing of an earlier pass, as `routings` of a model's output has it.

        Call it before the weights change: a pass without gradients computes its routing only when it is read.

        Args:
            routings: one for each layer.
            keep_gates: whether to keep the gates of that pass too.
        """
        gates = [routing.gate_TE.detach() for routing in routings] if keep_gates else None
        return cls([executed_pairs(routing) for routing in routings], gates)

    def apply(self, layer: int, router: Any, own: Routing, mask_T: Tensor | None = None) -> "ReplayedRouting":
        """The routing of one layer with the given pairs.

        Args:
            layer: its number.
            router: its router. Without given gates it must be a `ReLURouter` without a cap, or a `TopKRouter`: the
                gates of other routers are not defined on pairs that they did not choose.
            own: what the router returned.
            mask_T: (T,) bool, false for padding, whose given pairs are left out.

        Raises:
            ConfigError: for another number of layers, tokens or experts, or a router without gates on given pairs.
        """
        check(layer < len(self.active_LTE), f"the replay has {len(self.active_LTE)} layers, but the model has more")
        device, shape = own.gate_TE.device, own.gate_TE.shape
        active_TE = self.active_LTE[layer].to(device)
        if active_TE.shape != shape:
            raise ConfigError(f"the replay must be {tuple(shape)} for each layer, but is {tuple(active_TE.shape)}")
        known_T1 = None
        if self.known_T is not None:
            check(self.known_T.shape == shape[:1], f"known_T must be {tuple(shape[:1])}")
            known_T1 = self.known_T.to(device)[:, None]
            active_TE = torch.where(known_T1, active_TE, executed_pairs(own))
        active_TE = unmasked(active_TE, mask_T)
        if self.gate_LTE is None:
            gate_TE = gates_on_pairs(router, own, active_TE)
        else:
            gate_TE = self.gate_LTE[layer].to(device, own.gate_TE.dtype)
            check(gate_TE.shape == shape, f"the replay's gates must be {tuple(shape)}, but are {tuple(gate_TE.shape)}")
            gate_TE = torch.where(active_TE, gate_TE, 0)
            if known_T1 is not None:
                gate_TE = torch.where(known_T1, gate_TE, own.gate_TE)
        load_E = own.count_E if own.load_E is None else own.load_E
        values = own.logits_TE, own.num_tokens, own.regularizer, own.extra_loss, own.statistic_E
        known_T = None if self.known_T is None else self.known_T.to(device)
        pairs = Assignment.from_gates(gate_TE, active_TE)
        return ReplayedRouting(pairs, gate_TE, *values, load_E, own.closed_loss, own, known_T)


@tree
@dataclass(frozen=True)
class ReplayedRouting(Routing):
    """A `Routing` whose pairs were given. Its regulariser and its counts are those of the router.

    So lambda steers the sparsity of the router that is trained, and not that of the one that sampled.

    Attributes:
        own: what the router itself would have executed.
        known_T: (T,) bool, the tokens whose pairs were given; None for all.
    """

    own: Routing | None = None
    known_T: Tensor | None = None

    @property
    def count_E(self) -> Tensor:
        """(E,) int64, pairs per expert that the router itself would have executed."""
        assert self.own is not None
        return self.own.count_E

    def pruned(self, threshold: float | Tensor, cap: int | Tensor | None) -> Self:
        """As `Routing.pruned`, of the router's own pairs. Given pairs are executed as they were given."""
        assert self.own is not None
        own = self.own.pruned(threshold, cap)
        if self.known_T is None:
            return replace(self, own=own)
        known_T1 = self.known_T[:, None]
        gate_TE = torch.where(known_T1, self.gate_TE, own.gate_TE)
        active_TE = torch.where(known_T1, executed_pairs(self), executed_pairs(own))
        return replace(self, assignment=Assignment.from_gates(gate_TE, active_TE), gate_TE=gate_TE, own=own)


def gates_on_pairs(router: Any, own: Routing, active_TE: Tensor) -> Tensor:
    """(T, E) gates that a router gives to pairs that it need not have chosen; differentiable, zero elsewhere.

    A ReLU gate of a pair that the router would not open is zero.

    Args:
        router, own: the router and what it returned.
        active_TE: (T, E) bool, the pairs.

    Raises:
        ConfigError: for a router that has no gates on other pairs than its own.
    """
    if isinstance(router, ReLURouter) and router.cap is None and own.logits_TE is not None:
        gate_TE = torch.where(active_TE, router.scaled(F.relu(own.logits_TE)), 0)
    elif isinstance(router, TopKRouter) and own.logits_TE is not None:
        gate_TE = router._gates(own.logits_TE.softmax(dim=1), active_TE)
    else:
        raise ConfigError(f"{type(router).__name__} computes no gates on given pairs: replay with the recorded gates")
    # Where the pairs agree, the gradient takes the router's own way: a second one would round otherwise.
    agrees_T1 = (active_TE == executed_pairs(own)).all(dim=1, keepdim=True)
    return torch.where(agrees_T1, own.gate_TE, gate_TE)


def executed_pairs(routing: Routing) -> Tensor:
    """(T, E) bool: the pairs that the experts execute; a softmax may round the gate of one to zero."""
    pairs = routing.assignment
    if pairs.pair_TE is not None:
        return pairs.pair_TE >= 0
    T, E = routing.gate_TE.shape
    active_TE = torch.zeros(T, E + 1, dtype=torch.bool, device=routing.gate_TE.device)
    active_TE[pairs.token_N, pairs.expert_N] = True  # entries that are no pairs have the index E
    return active_TE[:, :E]


def disagreement(first_LTE: Sequence[Tensor], second_LTE: Sequence[Tensor], mask_T: Tensor | None = None) -> Tensor:
    """(L,) float32: in each layer, the share of pairs that only one of two routings has.

    The pairs of both together are the whole, so that it is 0 for equal routings and 1 for routings without a common
    pair. With k experts for every token it is the share of the k that differ.

    Args:
        first_LTE, second_LTE: for each layer (T, E) bool; the second may lie on another device.
        mask_T: (T,) bool, tokens to count, such as `Replay.known_T`; all by default.

    Raises:
        ConfigError: for routings of different sizes.
    """
    sizes = [[tuple(active_TE.shape) for active_TE in one] for one in (first_LTE, second_LTE)]
    check(sizes[0] == sizes[1], f"the two routings have different sizes: {sizes[0]} and {sizes[1]}")
    mask_T = None if mask_T is None else mask_T.to(first_LTE[0].device)
    first_LTE = [unmasked(active_TE, mask_T) for active_TE in first_LTE]
    second_LTE = [unmasked(active_TE.to(first_LTE[0].device), mask_T) for active_TE in second_LTE]
    pairs = [((a != b).sum(), a.sum() + b.sum()) for a, b in zip(first_LTE, second_LTE, strict=True)]
    return torch.stack([different.float() / total.clamp(min=1) for different, total in pairs])
