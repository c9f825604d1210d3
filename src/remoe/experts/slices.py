"""Experts on several ranks, where some of these hold the same tokens: each of them exchanges a slice of its own.

The slice of rank t of n are tokens t r to (t + 1) r - 1, r = ceil(T / n). All pairs of a token are in one slice, so its
sum over experts is what it is without slices. Outputs and gradients are gathered, so that all ranks hold the same ones.

Legend: T tokens, r of a slice, D model width, E experts, N listed pairs, s pairs of a slice.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.module import autocast_tensors
from remoe.routing.assignment import Assignment


def in_slices(
    run: Callable[[Tensor, Assignment], Tensor], x_TD: Tensor, assignment: Assignment, group: dist.ProcessGroup
) -> Tensor:
    """What `run` gives for all tokens, when each rank of a group calls it for a slice of these; differentiable.

    Args:
        run: from tokens and the pairs over these to a row for each token.
        x_TD: (T, D), the same on every rank of the group.
        assignment: pairs over these tokens, the same on every rank; the list may have room to spare. One host sync.
        group: the ranks that hold these tokens.

    Returns:
        (T, D); it and the gradients of tokens and gates are the same on every rank.
    """
    (x_TD,) = autocast_tensors(x_TD)
    T, rank = x_TD.shape[0], group.rank()
    rows = -(-T // group.size())
    first, last = min(rank * rows, T), min((rank + 1) * rows, T)
    y_rD = run(_Slice.apply(x_TD, first, last, rows, group), slice_of(assignment, first, last, group))
    return _Whole.apply(y_rD, first, last, rows, T, group)


def slice_of(assignment: Assignment, first: int, last: int, group: dist.ProcessGroup) -> Assignment:
    """The pairs of tokens `first` to `last` - 1, whose numbers begin at 0."""
    token_N = assignment.token_N
    used_N = torch.arange(len(token_N), device=token_N.device) < assignment.count_E.sum()
    pair_s = (used_N & (token_N >= first) & (token_N < last)).nonzero().flatten()
    expert_s = assignment.expert_N[pair_s]
    end_E = torch.searchsorted(expert_s, torch.arange(assignment.num_experts, device=token_N.device), right=True)
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    gate_s = _Gates.apply(assignment.gate_N, pair_s, group)
    return Assignment(token_N[pair_s] - first, expert_s, gate_s, count_E, last - first)


def _gather(own_rD: Tensor, rows: int, T: int, group: dist.ProcessGroup) -> Tensor:
    """All slices one after the other."""
    padded_rD = F.pad(own_rD, (0, 0, 0, rows - len(own_rD))).contiguous()
    whole = padded_rD.new_empty(rows * group.size(), own_rD.shape[1])
    dist.all_gather_into_tensor(whole, padded_rD, group=group)
    return whole[:T]


class _Slice(torch.autograd.Function):
    """This rank's tokens of those that all ranks hold; their gradients are gathered."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, first: int, last: int, rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.all = rows, len(x_TD), group
        return x_TD[first:last].clone()

    @staticmethod
    def backward(ctx, dx_rD: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(dx_rD, *ctx.all), None, None, None, None


class _Whole(torch.autograd.Function):
    """All ranks' rows; the gradient, which is the same on every rank, is cut: the transpose of `_Slice`."""

    @staticmethod
    def forward(ctx, y_rD: Tensor, first: int, last: int, rows: int, T: int, group: dist.ProcessGroup) -> Tensor:
        ctx.part = slice(first, last)
        return _gather(y_rD, rows, T, group)

    @staticmethod
    def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return dy_TD[ctx.part], None, None, None, None, None


class _Gates(torch.autograd.Function):
    """The gates of this rank's pairs; each gradient comes from the one rank that has the pair."""

    @staticmethod
    def forward(ctx, gate_N: Tensor, pair_s: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(pair_s)
        ctx.all = len(gate_N), group
        return gate_N[pair_s]

    @staticmethod
    def backward(ctx, dgate_s: Tensor) -> tuple[Tensor, None, None]:
        N, group = ctx.all
        dgate_N = dgate_s.new_zeros(N).index_copy(0, ctx.saved_tensors[0], dgate_s)
        dist.all_reduce(dgate_N, group=group)
        return dgate_N, None, None
