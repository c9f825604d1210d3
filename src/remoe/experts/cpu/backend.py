"""Experts on a CPU: whole passes in C++, and where those cannot be built, a loop of matrix products.

The C++ passes (passes.cpp) are the default, in float32, and in bfloat16 on processors with AVX512-BF16. The machine's
compiler builds them once (`remoe.experts.cpu.build`). Each thread takes a block of one expert's pairs through gather,
up projection, SwiGLU with the gate and down projection in its own scratch memory; then each token's rows are summed by
one thread, in the order of the experts. A few tokens without gradients, as in decoding, go through a kernel of their
own that reads each weight of the active experts once (`few_tokens` in steps.cpp).

The fallback runs on every device and in every dtype: one matrix product per block and projection, on all threads, with
the steps between the products in compiled kernels or plain torch operations (`remoe.experts.cpu.steps`). A token is at
most once in a block, so no two threads add to the same row.

Both add in the order of the experts: two runs agree bit for bit. Both multiply the hidden activation by the gate before
the down projection: its gradient then needs no expert output. Both recompute the activation in the backward pass from
the stored pre-activations, and those, too, where they were not stored.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, m pairs of one block,
L active experts.
"""

from typing import Any

import torch
from torch import Tensor

from remoe.experts.adapters import Adapters
from remoe.experts.contract import Backend, Problem
from remoe.experts.cpu.build import Kernels, Passes, compiled_kernels, compiled_passes
from remoe.experts.cpu.passes import active_experts, adapter_arguments, addresses, divide
from remoe.experts.cpu.steps import Block, CompiledSteps, TorchSteps
from remoe.experts.packed import is_packed, is_quantised

BLOCK, MIN_BLOCK = 512, 64  # pairs
# Up to so many pairs per active expert, reading the weights is what takes the time, and a GEMM would pack them first.
FEW_PAIRS = {torch.float32: 16, torch.bfloat16: 8}


def forward(stored: int, *problem: Tensor | None, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `Backend`."""
    p = Problem.contiguous(*problem)
    count, kernels = p.count_E.tolist(), _kernels(p.x_TD)
    D, F_ = p.down_EDF.shape[1:]
    y_TD, pre_C2F = _accumulator(p.x_TD), p.new_stored(stored)
    by_few = kernels if stored == 0 and adapters is None else None
    if by_few is not None and sum(count) <= FEW_PAIRS[p.x_TD.dtype] * sum(c > 0 for c in count):
        experts_3L, hidden_NF = active_experts(count), p.x_TD.new_empty(sum(count), F_)
        inputs, L = addresses(*p[:5], *experts_3L), experts_3L.shape[1]
        by_few.few_tokens(*inputs, L, D, F_, *addresses(hidden_NF, y_TD))
    elif passes := _passes(p.x_TD):
        sizes, low_rank = divide(p, pre_C2F.shape[0], count, False), adapter_arguments(adapters)
        scratch = torch.empty(passes.forward_scratch(sizes, low_rank), dtype=torch.uint8)
        passes.experts_forward(*addresses(*p[:6]), sizes, low_rank, *addresses(scratch, pre_C2F, y_TD))
    else:
        _forward_by_blocks(p, count, kernels, adapters, pre_C2F, y_TD)
    return y_TD.to(p.x_TD.dtype), pre_C2F


def backward(
    weights: bool, dy_TD: Tensor, pre_C2F: Tensor, *problem: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `Backend`."""
    p = Problem.contiguous(*problem)
    dweights = p.new_weight_gradients(weights)  # without memory unless `weights`: null pointers
    dx_TD, dgate_N = _backward(p, dy_TD.contiguous(), pre_C2F, dweights, None, None)
    return dx_TD, *dweights, dgate_N


def adapted_forward(stored: int, adapters: Adapters, *problem: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `Backend`."""
    return forward(stored, *problem, adapters=adapters.contiguous())


def adapted_backward(dy_TD: Tensor, pre_C2F: Tensor, adapters: Adapters, *problem: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of x, gate and adapters; see `Backend`."""
    p, adapters = Problem.contiguous(*problem), adapters.contiguous()
    gradients = adapters.new_gradients()
    none = p.new_weight_gradients(False)
    return *_backward(p, dy_TD.contiguous(), pre_C2F, none, adapters, gradients), *gradients


def _backward(
    p: Problem,
    dy_TD: Tensor,
    pre_C2F: Tensor,
    dweights: tuple[Tensor, Tensor],
    adapters: Adapters | None,
    gradients: Adapters | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate; those of weights, if these have memory, and adapters are written to their places."""
    count, weights = p.count_E.tolist(), dweights[0].numel() > 0
    dx_TD, dgate_N = _accumulator(p.x_TD), torch.zeros_like(p.gate_N)
    if passes := _passes(p.x_TD):
        sizes, low_rank = divide(p, pre_C2F.shape[0], count, weights), adapter_arguments(adapters, gradients)
        scratch = torch.empty(passes.backward_scratch(sizes, low_rank), dtype=torch.uint8)
        inputs, outputs = addresses(dy_TD, *p[:6], pre_C2F), addresses(scratch, dx_TD, *dweights, dgate_N)
        passes.experts_backward(*inputs, sizes, low_rank, *outputs)
    else:
        changes = (adapters, gradients) if adapters is not None and gradients is not None else None
        _backward_by_blocks(p, count, dy_TD, pre_C2F, dx_TD, dweights if weights else None, dgate_N, changes)
    return dx_TD.to(p.x_TD.dtype), dgate_N


def few_tokens(x_TD: Tensor, gate_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor | None:
    """The experts' output for a few tokens, from gates instead of pairs; without gradients.

    It is bit for bit that of `forward`, but for weights in 8 or 4 bits. None where that takes another path: no kernels,
    or too many tokens.

    Args:
        x_TD, gate_up_E2FD, down_EDF: contiguous, on the CPU, of one dtype; or weights that `is_quantised`.
        gate_TE: (T, E) contiguous float32, zero where there is no pair.
    """
    kernels = compiled_kernels(x_TD.dtype)
    if kernels is None:
        return None
    kernel = kernels.few_tokens_by_gates
    parts: list[Any] = [gate_up_E2FD, down_EDF]
    if is_packed(gate_up_E2FD):
        kernel = kernels.packed_by_gates
    elif is_quantised(gate_up_E2FD):
        kernel = kernels.scaled_by_gates
        parts = [part for weight in parts for part in (weight.qdata, weight.scale.float().contiguous())]
    y_TD, sizes = _accumulator(x_TD), (*x_TD.shape, gate_up_E2FD.shape[1] // 2, gate_up_E2FD.shape[0])
    done = kernel(*addresses(x_TD, gate_TE, *parts), *sizes, FEW_PAIRS[x_TD.dtype], y_TD.data_ptr())
    return y_TD.to(x_TD.dtype) if done else None


def _forward_by_blocks(
    p: Problem, count: list[int], kernels: Kernels | None, adapters: Adapters | None, pre_C2F: Tensor, y_TD: Tensor
) -> None:
    steps = CompiledSteps(kernels, p.token_N) if kernels is not None else TorchSteps(p.token_N)
    blocks = _blocks(count, pre_C2F.shape[0])
    m = max((block.size for block in blocks), default=0)
    D, F_ = p.down_EDF.shape[1:]
    x_mD, hidden_mF, scratch_m2F = (p.x_TD.new_empty(m, width) for width in (D, F_, 2 * F_))
    gate_up_ED2F, down_EFD = p.gate_up_E2FD.transpose(1, 2).unbind(), p.down_EDF.transpose(1, 2).unbind()
    for block in blocks:
        x, hidden = x_mD[: block.size], hidden_mF[: block.size]
        pre = _stored_rows(pre_C2F, block, scratch_m2F)
        steps.gather(p.x_TD, block, x)
        torch.mm(x, gate_up_ED2F[block.expert], out=pre)
        if adapters is not None:
            adapters.gate_up.add(block.expert, x, pre)
        steps.swiglu(pre, p.gate_N, block, hidden)
        torch.mm(hidden, down_EFD[block.expert], out=x)  # x has been read: its memory takes the output
        if adapters is not None:
            adapters.down.add(block.expert, hidden, x)
        steps.scatter_add(x, block, y_TD)


def _backward_by_blocks(
    p: Problem,
    count: list[int],
    dy_TD: Tensor,
    pre_C2F: Tensor,
    dx_TD: Tensor,
    dweights: tuple[Tensor, Tensor] | None,
    dgate_N: Tensor,
    changes: tuple[Adapters, Adapters] | None,
) -> None:
    kernels = _kernels(p.x_TD)
    steps = CompiledSteps(kernels, p.token_N) if kernels is not None else TorchSteps(p.token_N)
    blocks = _blocks(count, pre_C2F.shape[0])
    m = max((block.size for block in blocks), default=0)
    D, F_ = p.down_EDF.shape[1:]
    x_mD, dy_mD, dhidden_mF, hidden_mF, dpre_m2F = (p.x_TD.new_empty(m, w) for w in (D, D, F_, F_, 2 * F_))
    scratch_m2F = p.x_TD.new_empty(m if sum(count) > pre_C2F.shape[0] else 0, 2 * F_)
    gate_up, down = p.gate_up_E2FD.unbind(), p.down_EDF.unbind()
    dgate_up, ddown = (t.unbind() for t in dweights) if dweights is not None else ((), ())
    for e, gradients in enumerate(zip(dgate_up, ddown, strict=True)):
        if not count[e]:
            for gradient in gradients:
                gradient.zero_()
    for part in changes[1] if changes is not None else ():
        part.zero_()
    for block in blocks:
        e = block.expert
        x, dy, dhidden, hidden, dpre = (t[: block.size] for t in (x_mD, dy_mD, dhidden_mF, hidden_mF, dpre_m2F))
        steps.gather(p.x_TD, block, x)
        steps.gather(dy_TD, block, dy)
        pre = _stored_rows(pre_C2F, block, scratch_m2F)
        if block.end > pre_C2F.shape[0]:
            torch.mm(x, gate_up[e].t(), out=pre)
            if changes is not None:
                changes[0].gate_up.add(e, x, pre)
        torch.mm(dy, down[e], out=dhidden)
        if changes is not None:
            u_mq = changes[0].down.add_transposed(e, dy, dhidden)
        steps.swiglu_backward(pre, dhidden, p.gate_N, block, hidden, dpre, dgate_N)
        if dweights is not None:
            _add_product(ddown[e], dy.t(), hidden, block.first)
            _add_product(dgate_up[e], dpre.t(), x, block.first)
        if changes is not None:
            changes[0].down.add_gradients(e, hidden, dy, u_mq, changes[1].down)
        torch.mm(dpre, gate_up[e], out=dy)  # dy has been read
        if changes is not None:
            u_mr = changes[0].gate_up.add_transposed(e, dpre, dy)
            changes[0].gate_up.add_gradients(e, x, dpre, u_mr, changes[1].gate_up)
        steps.scatter_add(dy, block, dx_TD)


def _blocks(count: list[int], stored: int) -> list[Block]:
    """The pairs in blocks, smaller where more pairs are active than stored: scratch memory must not grow then."""
    limit = min(BLOCK, max(stored // 8, MIN_BLOCK)) if 0 < stored < sum(count) else BLOCK
    blocks, start = [], 0
    for expert, pairs in enumerate(count):
        parts = -(-pairs // limit)
        for part in range(parts):
            bounds = start + pairs * part // parts, start + pairs * (part + 1) // parts
            blocks.append(Block(expert, *bounds, first=part == 0))
        start += pairs
    return blocks


def _stored_rows(pre_C2F: Tensor, block: Block, scratch_m2F: Tensor) -> Tensor:
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


def _passes(x_TD: Tensor) -> Passes | None:
    return compiled_passes(x_TD.dtype) if x_TD.device.type == "cpu" else None


BACKEND = Backend(
    lambda *_: None, forward, backward, adapted_forward=adapted_forward, adapted_backward=adapted_backward
)
