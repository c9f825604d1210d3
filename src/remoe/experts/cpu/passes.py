"""Whole passes in compiled code: experts for a few tokens, and forward and backward passes.

Same arguments as in `remoe.experts.ops`, contiguous; `count` is count_E as a list.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, L active experts.
"""

import ctypes

import torch
from torch import Tensor

from remoe.experts.cpu.build import Kernels, RaggedKernels, Sizes
from remoe.experts.ops import empty_gradients

BLOCK, MIN_BLOCK, LEAST_BLOCK = 1024, 64, 8  # pairs that one thread takes through an expert at once
BLOCKS_PER_THREAD = 2  # at least, where all pairs are one expert's
WINDOW = 4096  # pairs per thread whose rows wait in scratch memory to be summed over experts


def few_tokens(
    kernels: Kernels,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count: list[int],
) -> Tensor:
    """Output of the forward pass; each weight of the active experts is read once, nothing is gathered or packed."""
    D, F_ = down_EDF.shape[1:]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    rows, start = [], 0
    for expert, pairs in enumerate(count):
        if pairs:
            rows.append((expert, start, pairs))
        start += pairs
    expert_L, start_L, count_L = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).t().contiguous().unbind()
    hidden_NF = x_TD.new_empty(start, F_)
    tensors = (x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, expert_L, start_L, count_L)
    kernels.few_tokens(*_addresses(*tensors), len(rows), D, F_, *_addresses(hidden_NF, y_TD))
    return y_TD.to(x_TD.dtype)


def forward(
    kernels: RaggedKernels,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    count: list[int],
    pre_C2F: Tensor,
) -> Tensor:
    """Output; pre_C2F takes the pre-activations of the first C pairs."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    sizes = _sizes(x_TD, down_EDF, pre_C2F, count)
    scratch = torch.empty(kernels.forward_scratch(sizes), dtype=torch.uint8)
    inputs = _addresses(x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E)
    kernels.experts_forward(*inputs, sizes, *_addresses(scratch, pre_C2F, y_TD))
    return y_TD.to(x_TD.dtype)


def backward(
    kernels: RaggedKernels,
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    count: list[int],
    pre_C2F: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate."""
    dx_TD, dgate_N = torch.zeros_like(x_TD, dtype=torch.float32), torch.zeros_like(gate_N)
    dgate_up_E2FD, ddown_EDF = empty_gradients(gate_up_E2FD, down_EDF, weights)  # without memory: null pointers
    sizes = _sizes(x_TD, down_EDF, pre_C2F, count)
    scratch = torch.empty(kernels.backward_scratch(sizes), dtype=torch.uint8)
    inputs = _addresses(dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pre_C2F)
    outputs = _addresses(scratch, dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N)
    kernels.experts_backward(*inputs, sizes, *outputs)
    return dx_TD.to(x_TD.dtype), dgate_up_E2FD, ddown_EDF, dgate_N


def _sizes(x_TD: Tensor, down_EDF: Tensor, pre_C2F: Tensor, count: list[int]) -> ctypes.Array:
    """T, D, F, E, C and the rows that scratch memory is for: W, m, window_factors, thread_factors (see passes.cpp).

    Blocks follow from the counts, C and the number of threads, so that both passes have the same, unless that number
    is changed in between: a pre-activation that is computed again is bit for bit the one that was not stored.
    """
    (T, D), (E, _, F_) = x_TD.shape, down_EDF.shape
    threads, pairs, C = torch.get_num_threads(), sum(count), pre_C2F.shape[0]
    block, window = BLOCK, WINDOW * threads
    if 0 < C < pairs:  # more experts are active than wanted: no more scratch memory than else
        # Of many threads none has enough for a fast product, but all together must not hold more than C.
        least = max(LEAST_BLOCK, min(MIN_BLOCK, C // (4 * threads)))
        block = min(block, max(C // (8 * threads), least))
        window = min(window, max(C // 8, threads * block))
    block = max(1, min(block, -(-pairs // (BLOCKS_PER_THREAD * threads)), max(count, default=0)))
    windows = max(1, -(-pairs // window))
    window = -(-pairs // windows)
    window_factors = window + block if any(pairs > block for pairs in count) else 0
    thread_factors = block if any(0 < pairs <= block for pairs in count) else 0
    return Sizes(T, D, F_, E, C, window, block, window_factors, thread_factors)


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
