"""What a router returns: the routed pairs, ragged, and what regularisers and statistics need.

Legend: T tokens, E experts, N listed pairs, of which the first R are routed.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from remoe.routing.pairs import list_pairs


def tree(kind: type) -> type:
    """A decorator of dataclasses with tensors: `torch.export` captures modules that return one."""
    torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind


@tree
@dataclass(frozen=True)
class Assignment:
    """The routed (token, expert) pairs of one layer: the currency between routers and experts.

    Pairs are sorted by expert and, within an expert, by token, so that an expert's tokens are one
    contiguous slice. A token may be in 0 to E pairs; nothing is padded to k.

    Where the number of pairs must not be asked of the device (CUDA, `torch.compile`), the lists have room for every
    possible pair: the R = sum(count_E) pairs come first, and the entries behind them mean nothing.

    Attributes:
        token_N: (N,) int64, row of the token.
        expert_N: (N,) int64, non-decreasing; E in entries that are no pairs.
        gate_N: (N,) float32, weight of the expert's output; differentiable.
        count_E: (E,) int64, pairs per expert; sums to R <= N.
        num_tokens: T, rows of the input, padding included.
        pair_TE: (T, E) int32, the place of each pair in the lists, -1 where there is none; or None, as it follows from
            them.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    count_E: Tensor
    num_tokens: int
    pair_TE: Tensor | None = None

    @classmethod
    def from_gates(cls, gate_TE: Tensor, active_TE: Tensor, max_pairs: int | None = None) -> "Assignment":
        """The pairs where `active_TE` is true, each with its gate.

        Args:
            gate_TE: (T, E) float32.
            active_TE: (T, E) bool.
            max_pairs: what the number of pairs cannot exceed, where it is less than T E.
        """
        T, E = gate_TE.shape
        if gate_TE.is_cuda or torch.compiler.is_compiling():
            N = T * E if max_pairs is None else max_pairs
            token_N, expert_N, gate_N, count_E, pair_TE = list_pairs(gate_TE, active_TE, N)
            return cls(token_N, expert_N, gate_N, count_E, T, pair_TE)
        active_ET = active_TE.t().contiguous()
        count_E = active_ET.sum(dim=1)
        expert_N, token_N = active_ET.nonzero(as_tuple=True)
        # masked_select walks (E, T) in the same order as nonzero, and its backward is a scatter without atomics.
        gate_N = gate_TE.t().masked_select(active_ET)
        return cls(token_N, expert_N, gate_N, count_E, T)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.count_E.shape[0]


@tree
@dataclass(frozen=True)
class Routing:
    """How one layer routed its tokens.

    Attributes:
        assignment: the pairs that the experts execute.
        gate_TE: (T, E) float32, the gates of the executed pairs and zero elsewhere; differentiable.
        logits_TE: (T, E) float32 router logits, or None where a router has none.
        num_tokens: 0-dim int64, tokens that are not padding.
        regularizer: 0-dim float32, the layer's auxiliary loss as a mean over its tokens; differentiable. Lambda or a
            constant coefficient multiplies it.
        extra_loss: 0-dim float32, added to the layer's loss as it is, its weight applied; None for none.
        statistic_E: (E,) float32 for `Router.update_state`, no gradient; None where a router has no use for it.
        closed_loss: 0-dim float32, how far closed pairs are from opening, of a router that `opens`; None for none.
        load_E: (E,) int64, tokens of each expert that the regulariser counts; None where they are `count_E`.
    """

    assignment: Assignment
    gate_TE: Tensor
    logits_TE: Tensor | None
    num_tokens: Tensor
    regularizer: Tensor
    extra_loss: Tensor | None = None
    statistic_E: Tensor | None = None
    load_E: Tensor | None = None
    closed_loss: Tensor | None = None

    @property
    def count_E(self) -> Tensor:
        """(E,) int64, routed pairs per expert."""
        return self.assignment.count_E

    def pruned(self, threshold: float | Tensor, cap: int | Tensor | None) -> Self:
        """The same routing without its weakest pairs: compute traded for loss, without training.

        Args:
            threshold: pairs whose gate is at most this in size are left out; (T,) for each token its own.
            cap: at most so many experts per token, those with the largest gates; None for no cap; (T,) int64 for each
                token its own.
        """
        keep_TE, most = strong(self.gate_TE, threshold, cap), self.assignment.token_N.shape[0]
        if isinstance(cap, int):
            most = min(most, keep_TE.shape[0] * cap)
        gate_TE = self.gate_TE * keep_TE
        return replace(self, assignment=Assignment.from_gates(gate_TE, keep_TE, most), gate_TE=gate_TE)

    @property
    def sparsity(self) -> Tensor:
        """0-dim float32: 1 - R / (T E), one layer's share of Eq. 8; padding does not count."""
        slots = (self.num_tokens * self.assignment.num_experts).clamp(min=1)
        return 1 - (self.count_E.sum() / slots).float()


class LateRouting(Routing):
    """A `Routing` that is made when one of its values is first asked for: generation asks for none.

    Args:
        make: returns it.
    """

    def __new__(cls, make: Callable[[], Routing] | None = None, **values: Any) -> Any:
        return super().__new__(cls) if make else Routing(**values)  # the latter for `dataclasses.replace`

    def __init__(self, make: Callable[[], Routing]) -> None:
        self.__dict__["_make"] = make

    @cached_property
    def whole(self) -> Routing:
        """The routing itself."""
        return self.__dict__.pop("_make")()

    def __reduce__(self) -> tuple:
        return Routing, tuple(getattr(self, field.name) for field in fields(Routing))


def _late(name: str) -> property:
    return property(lambda self: getattr(self.whole, name))


for _field in fields(Routing):
    setattr(LateRouting, _field.name, _late(_field.name))


def largest(score_TE: Tensor, k: int) -> Tensor:
    """(T, E) bool: the k largest scores of each token."""
    chosen_Tk = score_TE.topk(k, dim=1).indices
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, chosen_Tk, True)


def strong(gate_TE: Tensor, threshold: float | Tensor, cap: int | Tensor | None) -> Tensor:
    """(T, E) bool: the gates that `Routing.pruned` leaves with this threshold and cap."""
    size_TE = gate_TE.detach().abs()  # a learned scale may be negative
    keep_TE = ~(size_TE <= (threshold[:, None] if isinstance(threshold, Tensor) else threshold))
    if isinstance(cap, Tensor):
        order_TE = size_TE.argsort(dim=1, descending=True, stable=True)
        place_E = torch.arange(size_TE.shape[1], device=size_TE.device)
        keep_TE &= torch.zeros_like(keep_TE).scatter(1, order_TE, place_E < cap[:, None])
    elif cap is not None and cap < keep_TE.shape[1]:
        keep_TE &= largest(size_TE, cap)
    return keep_TE


def unmasked(active_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """`active_TE` without the rows of padding."""
    return active_TE if mask_T is None else active_TE & mask_T[:, None]


def count_tokens(x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    """0-dim int64: the tokens that `mask_T` keeps, all of them when it is None."""
    if mask_T is None:
        return torch.full((), x_TD.shape[0], device=x_TD.device)  # a copy from the host would wait on CUDA
    return mask_T.sum()
