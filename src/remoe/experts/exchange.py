"""Experts that are spread over ranks: exactly the routed pairs travel to their experts and back, by all-to-all.

Rank p of P holds experts p e to (p + 1) e - 1, e = E / P, and tokens of its own. Nothing is padded and nothing dropped:
a rank may send or receive any number of pairs, also none. Gates stay with the sender, which multiplies what comes back
and sums it per token in a fixed order. Tokens that several ranks hold are cut before: see `slices.py`.

A rank may receive far more pairs than usual, E/k times as many while all experts are active. So the pairs travel in
rounds in which no rank receives more rows than `receive_rows`. The backward pass keeps what the first round computed
and recomputes the others one by one, exchange included: a rank holds the activations of two rounds at most.

Legend: P ranks, T tokens of this rank, D model width, F expert width, E experts of all ranks, e of one rank, N listed
pairs, n pairs that this rank sends in a round, m rows that it receives.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remoe.errors import check
from remoe.experts.module import autocast_tensors, run_experts
from remoe.routing.assignment import Assignment

RECEIVE_ROWS = 65_536
_COUNT_BYTES = 8  # of an int64


class Stopwatch:
    """The time that this process spends in the exchange's collectives, with the wait for slower ranks.

    On CUDA it is that of the device between two events, which need no host sync until `seconds` is called.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Back to zero."""
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Context whose time on a device counts."""
        if device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Since `start`; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1e3


stopwatch = Stopwatch()


@dataclass(frozen=True)
class Round:
    """What one rank sends and receives in one round.

    Attributes:
        pair_n: (n,) int64, on the CPU: places in the sender's list, by receiver.
        sent_P, received_P: rows for and from each rank.
        received_Pe: (P, e) int64, on the CPU: rows from each rank for each expert of this one.
    """

    pair_n: Tensor
    sent_P: list[int]
    received_P: list[int]
    received_Pe: Tensor


class ExchangePlan:
    """Which pairs travel when: the same number of rounds on every rank, from the counts of all.

    Args:
        count_PE: (P, E) int64, on the CPU: pairs of each rank's tokens for each expert.
        rank: this rank's place in the group.
        receive_rows: rows that a rank receives in a round at most; at least P, one from each rank.
    """

    def __init__(self, count_PE: Tensor, rank: int, receive_rows: int = RECEIVE_ROWS) -> None:
        P, E = count_PE.shape
        self.rank, self.chunk = rank, max(receive_rows // P, 1)
        self._count_PPe = count_PE.view(P, P, E // P)  # sender, receiver, expert of the receiver
        self._pairs_PP = self._count_PPe.sum(dim=2)
        self.num_rounds = max(-(-int(self._pairs_PP.max()) // self.chunk), 1)

    def rounds(self) -> Iterator[Round]:
        """The rounds, in order; the last ones may be empty on this rank, but not on all."""
        end_PPe = self._count_PPe.cumsum(dim=2)
        first_P = self._pairs_PP[self.rank].cumsum(dim=0) - self._pairs_PP[self.rank]
        for number in range(self.num_rounds):
            start = number * self.chunk
            now_PPe = (end_PPe - start).clamp(0, self.chunk).diff(dim=2, prepend=torch.zeros_like(end_PPe[..., :1]))
            sent_P = now_PPe[self.rank].sum(dim=1).tolist()
            pieces = [torch.arange(rows) + first + start for rows, first in zip(sent_P, first_P.tolist(), strict=True)]
            received_Pe = now_PPe[:, self.rank]
            yield Round(torch.cat(pieces), sent_P, received_Pe.sum(dim=1).tolist(), received_Pe)

    def bytes_sent(self, d_model: int, itemsize: int) -> tuple[int, int]:
        """Bytes that this rank sends to others in the forward pass and in the backward pass of one layer.

        Forward, a pair takes a token to its expert and an output back: D numbers each; and the counts of this rank go
        to every other. Backward, two gradients take the same ways, after the recomputation of all rounds but the first.
        """
        others = [p for p in range(len(self._pairs_PP)) if p != self.rank]
        pairs = torch.cat([self._pairs_PP[self.rank, others], self._pairs_PP[others, self.rank]])
        sent, recomputed = int(pairs.sum()), int((pairs - self.chunk).clamp(min=0).sum())
        counts, row = self._count_PPe[0].numel() * _COUNT_BYTES * len(others), d_model * itemsize
        return counts + sent * row, (sent + recomputed) * row


def plan_exchange(count_E: Tensor, group: dist.ProcessGroup, receive_rows: int = RECEIVE_ROWS) -> ExchangePlan:
    """The plan of all ranks' counts; every rank of the group must call it. One collective and one host sync.

    Args:
        count_E: (E,) int64, pairs of this rank's tokens.
        group: the ranks that share the experts.
        receive_rows: see `ExchangePlan`.

    Raises:
        ConfigError: when the ranks do not divide the experts.
    """
    P, E = group.size(), count_E.shape[0]
    check(E % P == 0, f"{E} experts cannot be divided among {P} ranks")
    count_PE = [torch.empty_like(count_E) for _ in range(P)]
    with stopwatch.running(count_E.device):
        dist.all_gather(count_PE, count_E.contiguous(), group=group)
    return ExchangePlan(torch.stack(count_PE).cpu(), group.rank(), receive_rows)


def exchange_experts(
    x_TD: Tensor,
    gate_up_e2FD: Tensor,
    down_eDF: Tensor,
    assignment: Assignment,
    group: dist.ProcessGroup,
    backend: str = "auto",
    receive_rows: int = RECEIVE_ROWS,
    stored: int | None = None,
) -> Tensor:
    """`run_experts` over the experts of all ranks of a group, each of which must call it; differentiable.

    Args:
        x_TD: (T, D), tokens of this rank; T may differ between ranks.
        gate_up_e2FD, down_eDF: (e, 2F, D), (e, D, F), this rank's experts.
        assignment: pairs of these tokens over all E experts; on CUDA the list may have room to spare.
        group: the ranks that share the experts, in the order of these.
        backend: of the experts, see `run_experts`.
        receive_rows: rows that a rank receives at a time, see `ExchangePlan`.
        stored: of a round, see `run_experts`.

    Returns:
        (T, D), zero for tokens without an expert; in the autocast dtype under autocast, otherwise in x's. A rank's
        weights get the gradients of all ranks' tokens.

    Raises:
        ConfigError: as `plan_exchange` and `run_experts`.
    """
    x_TD, gate_up_e2FD, down_eDF = autocast_tensors(x_TD, gate_up_e2FD, down_eDF)
    plan = plan_exchange(assignment.count_E, group, receive_rows)
    y_TD = None

    def run(turn: Round, x_TD: Tensor, gate_N: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor) -> Tensor:
        pair_n = turn.pair_n.to(x_TD.device)
        token_n = assignment.token_N[pair_n]
        rows_mD = _AllToAll.apply(_Gather.apply(x_TD, token_n), turn.sent_P, turn.received_P, group)
        here = _by_expert(turn.received_Pe.to(x_TD.device), len(rows_mD))
        out_mD = run_experts(rows_mD, gate_up_e2FD, down_eDF, here, backend, stored)
        back_nD = _AllToAll.apply(out_mD, turn.received_P, turn.sent_P, group)
        weighted_nD = back_nD * _Gather.apply(gate_N[:, None], pair_n)
        return _SumPerToken.apply(weighted_nD, token_n, x_TD.shape[0])

    for turn in plan.rounds():
        leaves = (turn, x_TD, assignment.gate_N, gate_up_e2FD, down_eDF)
        if y_TD is None:
            y_TD = run(*leaves)
        else:
            y_TD = y_TD + checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)
    assert y_TD is not None
    return y_TD.to(x_TD.dtype)


class _AllToAll(torch.autograd.Function):
    """Rows by rank to their ranks, and their gradients back."""

    @staticmethod
    def forward(ctx, rows_nD: Tensor, sent_P: list[int], received_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.ways = received_P, sent_P, group
        out_mD = rows_nD.new_empty(sum(received_P), *rows_nD.shape[1:])
        rows_nD = rows_nD.contiguous()
        with stopwatch.running(rows_nD.device):
            dist.all_to_all_single(out_mD, rows_nD, received_P, sent_P, group=group)
        return out_mD

    @staticmethod
    def backward(ctx, dout_mD: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(dout_mD, *ctx.ways), None, None, None


class _Gather(torch.autograd.Function):
    """Rows by their numbers. The gradient sums in a fixed order, unlike that of indexing on CUDA."""

    @staticmethod
    def forward(ctx, rows_TD: Tensor, token_n: Tensor) -> Tensor:
        ctx.save_for_backward(token_n)
        ctx.rows = rows_TD.shape[0]
        return rows_TD.index_select(0, token_n)

    @staticmethod
    def backward(ctx, dout_nD: Tensor) -> tuple[Tensor, None]:
        return _sum_per_row(dout_nD, ctx.saved_tensors[0], ctx.rows), None


class _SumPerToken(torch.autograd.Function):
    """(T, D), the sum of each token's rows: the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx, rows_nD: Tensor, token_n: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token_n)
        return _sum_per_row(rows_nD, token_n, tokens)

    @staticmethod
    def backward(ctx, dsum_TD: Tensor) -> tuple[Tensor, None, None]:
        return dsum_TD.index_select(0, ctx.saved_tensors[0]), None, None


def _sum_per_row(rows_nD: Tensor, row_n: Tensor, rows: int) -> Tensor:
    """The gradient of an embedding lookup is a segment sum in a fixed order on every device."""
    return torch.ops.aten.embedding_dense_backward(rows_nD.contiguous(), row_n, rows, -1, False)


def _by_expert(received_Pe: Tensor, rows: int) -> Assignment:
    """The received rows as pairs sorted by expert, each row a token of its own, with gate one."""
    P, e = received_Pe.shape
    device = received_Pe.device
    expert_m = torch.arange(e, device=device).repeat(P)
    expert_m = expert_m.repeat_interleave(received_Pe.reshape(-1), output_size=rows)
    expert_m, row_m = torch.sort(expert_m, stable=True)
    return Assignment(row_m, expert_m, torch.ones(rows, device=device), received_Pe.sum(dim=0), rows)
