"""Experts in `torch.nn.functional.grouped_mm`, with plain torch operations between the products.

The offsets of the experts' rows stay on the device, except where torch has no kernel and loops over the experts, as in
float32. All other operations work on whole windows (`remoe.experts.windows`), including the rows behind the last pair:
the price of needing nothing but torch. Windows without pairs would cost as much, so before the second window the host
waits until the device, busy with the first, has counted the pairs. Rows behind the last pair reach no result.

The combine is the gradient of an embedding lookup: a segment sum that is deterministic on every device and sums in
float32 on GPUs.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, m rows of one window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.adapters import Adapters, LowRank
from remoe.experts.contract import Backend, Problem
from remoe.experts.windows import PairCount, windows
from remoe.matmul import aligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(device: torch.device, dtype: torch.dtype, d_model: int, d_ffn: int) -> str | None:
    """Why it cannot run there, or None when it can."""
    if dtype not in DTYPES:
        return f"grouped_mm does not take {dtype}"
    if d_model * dtype.itemsize % 16 or d_ffn * dtype.itemsize % 16:
        return f"rows of {d_model} and {d_ffn} numbers in {dtype} are not multiples of 16 bytes"
    return None


def forward(stored: int, *problem: Tensor | None, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `Backend`."""
    p = Problem._make(problem)
    gate_up, down = _Change.of_both(adapters)
    gate_up_ED2F, down_EFD = aligned(p.gate_up_E2FD).transpose(1, 2), aligned(p.down_EDF).transpose(1, 2)
    y_TD, pre_C2F = torch.zeros_like(p.x_TD), p.new_stored(stored)
    for window in _windows(p, pre_C2F.shape[0]):
        x_mD = window.gather(p.x_TD)
        pre_m2F = F.grouped_mm(x_mD, gate_up_ED2F, offs=window.end_E)
        if gate_up is not None:
            gate_up.add(window, x_mD, pre_m2F)
        kept = pre_C2F[window.first : window.first + window.size]
        kept.copy_(pre_m2F[: kept.shape[0]])
        a_mF, b_mF = pre_m2F.chunk(2, dim=1)
        hidden_mF = (F.silu(a_mF) * b_mF).mul_(window.gate_m1)
        out_mD = F.grouped_mm(hidden_mF, down_EFD, offs=window.end_E)
        if down is not None:
            down.add(window, hidden_mF, out_mD)
        window.combine(out_mD, y_TD)
    return y_TD, pre_C2F


def backward(
    weights: bool, dy_TD: Tensor, pre_C2F: Tensor, *problem: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `Backend`."""
    p = Problem._make(problem)
    dx_TD, dgate_N, dweights, _ = _backward(weights, dy_TD, pre_C2F, p, None)
    return dx_TD, *dweights, dgate_N


def adapted_forward(stored: int, adapters: Adapters, *problem: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `Backend`."""
    return forward(stored, *problem, adapters=adapters)


def adapted_backward(dy_TD: Tensor, pre_C2F: Tensor, adapters: Adapters, *problem: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of x, gate and adapters; see `Backend`."""
    dx_TD, dgate_N, _, changes = _backward(False, dy_TD, pre_C2F, Problem._make(problem), adapters)
    gradients = adapters.new_gradients()
    for change, gradient in zip(changes, (gradients.gate_up, gradients.down), strict=True):
        if change is not None:
            change.write_gradients(gradient)
    return dx_TD, dgate_N, *gradients


def _backward(
    weights: bool, dy_TD: Tensor, pre_C2F: Tensor, p: Problem, adapters: Adapters | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple["_Change | None", "_Change | None"]]:
    gate_up, down = _Change.of_both(adapters)
    gate_up_E2FD, down_EDF = aligned(p.gate_up_E2FD), aligned(p.down_EDF)
    C = pre_C2F.shape[0]
    dx_TD, dgate_N = torch.zeros_like(p.x_TD), torch.zeros_like(p.gate_N)
    dgate_up_E2FD = ddown_EDF = None
    for window in _windows(p, C):
        end = window.first + window.size
        x_mD, dy_mD = window.gather(p.x_TD), window.gather(dy_TD)
        if end <= C:
            pre_m2F = pre_C2F[window.first : end]
        else:
            pre_m2F = F.grouped_mm(x_mD, gate_up_E2FD.transpose(1, 2), offs=window.end_E)
            if gate_up is not None:
                gate_up.add(window, x_mD, pre_m2F)
        dhidden_mF = F.grouped_mm(dy_mD, down_EDF, offs=window.end_E)
        u_mq = None if down is None else down.add_transposed(window, dy_mD, dhidden_mF)
        hidden_mF, dpre_m2F, dgate_m = _swiglu_backward(pre_m2F, dhidden_mF, window.gate_m1)
        dgate_N[window.first : end] = dgate_m.masked_fill_(window.behind_m, 0)
        if weights:
            ddown_EDF = window.add_products(ddown_EDF, dy_mD, hidden_mF)
            dgate_up_E2FD = window.add_products(dgate_up_E2FD, dpre_m2F, x_mD)
        dx_mD = F.grouped_mm(dpre_m2F, gate_up_E2FD, offs=window.end_E)
        if down is not None and u_mq is not None:
            down.add_gradients(window, hidden_mF, dy_mD, u_mq)
        if gate_up is not None:
            u_mr = gate_up.add_transposed(window, dpre_m2F, dx_mD)
            gate_up.add_gradients(window, x_mD, dpre_m2F, u_mr)
        window.combine(dx_mD, dx_TD)
    if dgate_up_E2FD is None or ddown_EDF is None:
        dgate_up_E2FD, ddown_EDF = (t.zero_() for t in p.new_weight_gradients(weights))
    return dx_TD, dgate_N, (dgate_up_E2FD, ddown_EDF), (gate_up, down)


def _swiglu_backward(pre_m2F: Tensor, dhidden_mF: Tensor, gate_m1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a_mF, b_mF = pre_m2F.chunk(2, dim=1)
    sigmoid_mF = torch.sigmoid(a_mF)
    silu_mF = sigmoid_mF * a_mF
    hidden_mF = silu_mF * b_mF
    dgate_m = (dhidden_mF.to(gate_m1.dtype) * hidden_mF).sum(dim=1)
    dhidden_mF = dhidden_mF.mul_(gate_m1)
    # d silu(a) / da = sigmoid + silu * (1 - sigmoid)
    da_mF = dhidden_mF * b_mF * (sigmoid_mF + silu_mF * (1 - sigmoid_mF))
    return hidden_mF.mul_(gate_m1), torch.cat((da_mF, dhidden_mF * silu_mF), dim=1), dgate_m


@dataclass(frozen=True, slots=True)
class _Window:
    """The listed pairs from `first` on.

    Attributes:
        end_E: (E,) int32, where each expert's rows end in the window.
        token_m: (m,) int64; T in rows behind the pairs.
        behind_m: (m,) bool, these rows.
        gate_m1: (m, 1).
    """

    first: int
    size: int
    end_E: Tensor
    token_m: Tensor
    behind_m: Tensor
    gate_m1: Tensor

    def gather(self, rows_TD: Tensor) -> Tensor:
        """The pairs' tokens."""
        return rows_TD.index_select(0, self.token_m.clamp(max=rows_TD.shape[0] - 1))

    def combine(self, rows_mD: Tensor, out_TD: Tensor) -> None:
        """Adds each pair's row to its token."""
        T = out_TD.shape[0]
        # Index T, which is what lies behind the pairs, is skipped.
        sum_TD = torch.ops.aten.embedding_dense_backward(rows_mD, self.token_m, T + 1, T, False)[:T]
        if self.first:
            out_TD.add_(sum_TD)
        else:
            out_TD.copy_(sum_TD)

    def add_products(self, sum_EIJ: Tensor | None, left_mI: Tensor, right_mJ: Tensor) -> Tensor:
        """Adds left^T @ right over each expert's rows to `sum_EIJ`, which is nothing at first."""
        product_EIJ = F.grouped_mm(left_mI.t(), right_mJ, offs=self.end_E)
        # What a kernel writes for an expert without rows is not documented.
        start_E = torch.cat((self.end_E.new_zeros(1), self.end_E[:-1]))
        product_EIJ.masked_fill_((self.end_E == start_E)[:, None, None], 0)
        return product_EIJ if sum_EIJ is None else sum_EIJ.add_(product_EIJ)


class _Change:
    """A low-rank change of one projection, its rank padded with zeros to a multiple of 16 bytes; and its gradients."""

    def __init__(self, change: LowRank) -> None:
        pad = -change.rank % (16 // change.a_ErI.itemsize)
        self._a_ErI = aligned(F.pad(change.a_ErI, (0, 0, 0, pad)))
        self._b_ErO = aligned(F.pad(change.b_rEO, (0, 0, 0, 0, 0, pad)).transpose(0, 1))
        self._da_ErI: Tensor | None = None
        self._db_ErO: Tensor | None = None

    @classmethod
    def of_both(cls, adapters: Adapters | None) -> tuple["_Change | None", "_Change | None"]:
        """Those of gate_up and down; None for one that changes nothing."""
        if adapters is None:
            return None, None
        gate_up, down = (cls(change) if change.rank else None for change in (adapters.gate_up, adapters.down))
        return gate_up, down

    def _inner(self, window: _Window, in_mI: Tensor) -> Tensor:
        return F.grouped_mm(in_mI, self._a_ErI.transpose(1, 2), offs=window.end_E)

    def add(self, window: _Window, in_mI: Tensor, out_mO: Tensor) -> None:
        """See `LowRank`, as for the next two."""
        out_mO.add_(F.grouped_mm(self._inner(window, in_mI), self._b_ErO, offs=window.end_E))

    def add_transposed(self, window: _Window, dout_mO: Tensor, din_mI: Tensor) -> Tensor:
        u_mr = F.grouped_mm(dout_mO, self._b_ErO.transpose(1, 2), offs=window.end_E)
        din_mI.add_(F.grouped_mm(u_mr, self._a_ErI, offs=window.end_E))
        return u_mr

    def add_gradients(self, window: _Window, in_mI: Tensor, dout_mO: Tensor, u_mr: Tensor) -> None:
        self._da_ErI = window.add_products(self._da_ErI, u_mr, in_mI)
        self._db_ErO = window.add_products(self._db_ErO, self._inner(window, in_mI), dout_mO)

    def write_gradients(self, gradient: LowRank) -> None:
        """Writes what `add_gradients` has summed."""
        for sums, to in ((self._da_ErI, gradient.a_ErI), (self._db_ErO, gradient.b_rEO.transpose(0, 1))):
            to.copy_(sums[:, : gradient.rank]) if sums is not None else to.zero_()


def _windows(p: Problem, stored: int) -> Iterator[_Window]:
    T, end_E = p.x_TD.shape[0], p.count_E.cumsum(0)
    slices = windows(p.token_N.shape[0], stored, T, *p.down_EDF.shape[1:])
    count = PairCount(p.count_E, len(slices))
    for pairs in slices:
        if count.end_before(pairs, wait=True):
            break
        row_m = torch.arange(pairs.start, pairs.stop, device=p.token_N.device)
        behind_m = row_m >= end_E[-1]
        yield _Window(
            first=pairs.start,
            size=len(pairs),
            end_E=(end_E - pairs.start).clamp(0, len(pairs)).to(torch.int32),
            token_m=p.token_N[pairs.start : pairs.stop].masked_fill(behind_m, T),
            behind_m=behind_m,
            gate_m1=p.gate_N[pairs.start : pairs.stop, None],
        )


BACKEND = Backend(obstacle, forward, backward, adapted_forward=adapted_forward, adapted_backward=adapted_backward)
