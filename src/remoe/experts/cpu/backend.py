"""One GEMM per active expert and projection; everything between them in one pass over memory, in compiled kernels.

Experts run one after the other on all threads, a block of their pairs at a time: gather, up projection, SwiGLU with
the gate, down projection, and the rows are added to their tokens while they are still in cache. Because a token is at
most once in a block, no two threads add to the same row, and the order of the additions is the order of the experts:
two runs agree bit for bit. Scratch memory is that of one block.

The gate multiplies the hidden activation, before the down projection: its gradient then needs no expert output. The
backward pass recomputes the activation from the stored pre-activations, and those too where they were not stored.

Where there are compiled kernels for whole passes, `compiled.py` takes those instead, a block per thread: in float32,
and in bfloat16 on processors that multiply it. Runs on every device, by plain torch operations where nothing is built.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, m pairs of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.cpu import passes as compiled
from remoe.experts.cpu.build import Kernels, RaggedKernels, compiled_kernels, ragged_kernels
from remoe.experts.ops import empty_gradients

BLOCK, MIN_BLOCK = 512, 64  # pairs
# Up to so many pairs per active expert, reading the weights is what takes the time, and a GEMM would pack them first.
FEW_PAIRS = {torch.float32: 16, torch.bfloat16: 8}


def obstacle(device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> None:
    """None: it runs everywhere."""


def forward(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    stored: int,
) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `remoe.experts.ops`."""
    x_TD, gate_up_E2FD, down_EDF = x_TD.contiguous(), gate_up_E2FD.contiguous(), down_EDF.contiguous()
    gate_N, token_N, count_E = gate_N.contiguous(), token_N.contiguous(), count_E.contiguous()
    count, kernels = count_E.tolist(), _kernels(x_TD)
    pre_C2F = x_TD.new_empty(min(token_N.shape[0], stored), gate_up_E2FD.shape[1])
    if kernels is not None and stored == 0 and sum(count) <= FEW_PAIRS[x_TD.dtype] * sum(c > 0 for c in count):
        return compiled.few_tokens(kernels, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count), pre_C2F
    if ragged := _ragged_kernels(x_TD):
        return compiled.forward(ragged, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, count, pre_C2F), pre_C2F

    steps = _Compiled(kernels, token_N) if kernels is not None else _Plain(token_N)
    blocks = _blocks(count, pre_C2F.shape[0])
    m = max((block.size for block in blocks), default=0)
    D, F_ = down_EDF.shape[1:]
    x_mD, hidden_mF, scratch_m2F = (x_TD.new_empty(m, width) for width in (D, F_, 2 * F_))
    y_TD = _accumulator(x_TD)
    gate_up_ED2F, down_EFD = gate_up_E2FD.transpose(1, 2).unbind(), down_EDF.transpose(1, 2).unbind()
    for block in blocks:
        x, hidden = x_mD[: block.size], hidden_mF[: block.size]
        pre = _stored_rows(pre_C2F, block, scratch_m2F)
        steps.gather(x_TD, block, x)
        torch.mm(x, gate_up_ED2F[block.expert], out=pre)
        steps.swiglu(pre, gate_N, block, hidden)
        torch.mm(hidden, down_EFD[block.expert], out=x)  # x has been read: its memory takes the output
        steps.scatter_add(x, block, y_TD)
    return y_TD.to(x_TD.dtype), pre_C2F


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    pre_C2F: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `remoe.experts.ops`."""
    dy_TD, x_TD, gate_N = dy_TD.contiguous(), x_TD.contiguous(), gate_N.contiguous()
    gate_up_E2FD, down_EDF = gate_up_E2FD.contiguous(), down_EDF.contiguous()
    token_N, count_E = token_N.contiguous(), count_E.contiguous()
    count, kernels = count_E.tolist(), _kernels(x_TD)
    if ragged := _ragged_kernels(x_TD):
        inputs = (dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E)
        return compiled.backward(ragged, *inputs, count, pre_C2F, weights)

    steps = _Compiled(kernels, token_N) if kernels is not None else _Plain(token_N)
    blocks = _blocks(count, pre_C2F.shape[0])
    m = max((block.size for block in blocks), default=0)
    D, F_ = down_EDF.shape[1:]
    x_mD, dy_mD, dhidden_mF, hidden_mF, dpre_m2F = (x_TD.new_empty(m, w) for w in (D, D, F_, F_, 2 * F_))
    scratch_m2F = x_TD.new_empty(m if sum(count) > pre_C2F.shape[0] else 0, 2 * F_)
    dx_TD, dgate_N = _accumulator(x_TD), torch.zeros_like(gate_N)
    dgate_up_E2FD, ddown_EDF = empty_gradients(gate_up_E2FD, down_EDF, weights)
    gate_up, dgate_up, down, ddown = (t.unbind() for t in (gate_up_E2FD, dgate_up_E2FD, down_EDF, ddown_EDF))
    for e, pairs in enumerate(count):
        if weights and not pairs:
            dgate_up[e].zero_()
            ddown[e].zero_()
    for block in blocks:
        e = block.expert
        x, dy, dhidden, hidden, dpre = (t[: block.size] for t in (x_mD, dy_mD, dhidden_mF, hidden_mF, dpre_m2F))
        steps.gather(x_TD, block, x)
        steps.gather(dy_TD, block, dy)
        pre = _stored_rows(pre_C2F, block, scratch_m2F)
        if block.end > pre_C2F.shape[0]:
            torch.mm(x, gate_up[e].t(), out=pre)
        torch.mm(dy, down[e], out=dhidden)
        steps.swiglu_backward(pre, dhidden, gate_N, block, hidden, dpre, dgate_N)
        if weights:
            _add_product(ddown[e], dy.t(), hidden, block.first)
            _add_product(dgate_up[e], dpre.t(), x, block.first)
        torch.mm(dpre, gate_up[e], out=dy)  # dy has been read
        steps.scatter_add(dy, block, dx_TD)
    return dx_TD.to(x_TD.dtype), dgate_up_E2FD, ddown_EDF, dgate_N


@dataclass(frozen=True, slots=True)
class _Block:
    """Pairs [start, end) of one expert; `first` when they are the expert's first ones."""

    expert: int
    start: int
    end: int
    first: bool

    @property
    def size(self) -> int:
        return self.end - self.start


def _blocks(count: list[int], stored: int) -> list[_Block]:
    """The pairs in blocks, smaller where more pairs are active than stored: scratch memory must not grow then."""
    limit = min(BLOCK, max(stored // 8, MIN_BLOCK)) if 0 < stored < sum(count) else BLOCK
    blocks, start = [], 0
    for expert, pairs in enumerate(count):
        parts = -(-pairs // limit)
        for part in range(parts):
            bounds = start + pairs * part // parts, start + pairs * (part + 1) // parts
            blocks.append(_Block(expert, *bounds, first=part == 0))
        start += pairs
    return blocks


def _stored_rows(pre_C2F: Tensor, block: _Block, scratch_m2F: Tensor) -> Tensor:
    """The block's place among the stored pre-activations, or scratch memory when it has none."""
    return pre_C2F[block.start : block.end] if block.end <= pre_C2F.shape[0] else scratch_m2F[: block.size]


def _add_product(sum_: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if first:
        torch.mm(a, b, out=sum_)
    else:
        torch.addmm(sum_, a, b, out=sum_)


def _accumulator(x_TD: Tensor) -> Tensor:
    """Zeros like x in at least float32: a token's sum over its experts is rounded once."""
    return torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))


def _kernels(x_TD: Tensor) -> Kernels | None:
    return compiled_kernels(x_TD.dtype) if x_TD.device.type == "cpu" else None


def _ragged_kernels(x_TD: Tensor) -> RaggedKernels | None:
    return ragged_kernels(x_TD.dtype) if x_TD.device.type == "cpu" else None


class _Compiled:
    """The steps between the products by steps.cpp."""

    def __init__(self, kernels: Kernels, token_N: Tensor) -> None:
        self.kernels, self.token_N = kernels, token_N  # the address lives as long as its tensor
        self.token = token_N.data_ptr()

    def gather(self, x_TD: Tensor, block: _Block, out_mD: Tensor) -> None:
        token = self.token + 8 * block.start
        self.kernels.gather(x_TD.data_ptr(), token, block.size, x_TD.shape[1], out_mD.data_ptr())

    def scatter_add(self, out_mD: Tensor, block: _Block, y_TD: Tensor) -> None:
        token = self.token + 8 * block.start
        self.kernels.scatter_add(out_mD.data_ptr(), token, block.size, y_TD.shape[1], y_TD.data_ptr())

    def swiglu(self, pre_m2F: Tensor, gate_N: Tensor, block: _Block, hidden_mF: Tensor) -> None:
        gate = gate_N.data_ptr() + 4 * block.start
        self.kernels.swiglu(pre_m2F.data_ptr(), gate, block.size, hidden_mF.shape[1], hidden_mF.data_ptr())

    def swiglu_backward(
        self,
        pre_m2F: Tensor,
        dhidden_mF: Tensor,
        gate_N: Tensor,
        block: _Block,
        hidden_mF: Tensor,
        dpre_m2F: Tensor,
        dgate_N: Tensor,
    ) -> None:
        at = 4 * block.start
        inputs = pre_m2F.data_ptr(), dhidden_mF.data_ptr(), gate_N.data_ptr() + at
        outputs = hidden_mF.data_ptr(), dpre_m2F.data_ptr(), dgate_N.data_ptr() + at
        self.kernels.swiglu_backward(*inputs, block.size, hidden_mF.shape[1], *outputs)


class _Plain:
    """The same steps by torch operations: the fallback, and what float64 and devices without kernels use."""

    def __init__(self, token_N: Tensor) -> None:
        self.token_N = token_N

    def gather(self, x_TD: Tensor, block: _Block, out_mD: Tensor) -> None:
        torch.index_select(x_TD, 0, self.token_N[block.start : block.end], out=out_mD)

    def scatter_add(self, out_mD: Tensor, block: _Block, y_TD: Tensor) -> None:
        y_TD.index_add_(0, self.token_N[block.start : block.end], out_mD.to(y_TD.dtype))

    def swiglu(self, pre_m2F: Tensor, gate_N: Tensor, block: _Block, hidden_mF: Tensor) -> None:
        a_mF, b_mF = pre_m2F.chunk(2, dim=1)
        torch.mul(F.silu(a_mF), b_mF, out=hidden_mF).mul_(gate_N[block.start : block.end, None])

    def swiglu_backward(
        self,
        pre_m2F: Tensor,
        dhidden_mF: Tensor,
        gate_N: Tensor,
        block: _Block,
        hidden_mF: Tensor,
        dpre_m2F: Tensor,
        dgate_N: Tensor,
    ) -> None:
        (a_mF, b_mF), (da_mF, db_mF) = pre_m2F.chunk(2, dim=1), dpre_m2F.chunk(2, dim=1)
        gate_m1 = gate_N[block.start : block.end, None]
        sigmoid_mF = torch.sigmoid(a_mF)
        silu_mF = sigmoid_mF * a_mF
        torch.mul(silu_mF, b_mF, out=hidden_mF)
        torch.sum(dhidden_mF.to(gate_N.dtype) * hidden_mF, dim=1, out=dgate_N[block.start : block.end])
        hidden_mF.mul_(gate_m1)
        dhidden_mF.mul_(gate_m1)
        torch.mul(dhidden_mF, silu_mF, out=db_mF)
        # d silu(a) / da = sigmoid + silu * (1 - sigmoid)
        torch.mul(dhidden_mF.mul_(b_mF), silu_mF.mul_(1 - sigmoid_mF).add_(sigmoid_mF), out=da_mF)
