"""Whole passes in compiled code: experts for a few tokens, and float32 forward and backward passes on MKL.

Same arguments as in `remoe.experts.ops`, contiguous; `count` is count_E as a list.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, L active experts.
"""

import torch
from torch import Tensor

from remoe.experts.kernels import Kernels, RaggedKernels

BLOCK = 1024  # most pairs that one thread takes through an expert at once
BLOCKS_PER_THREAD = 2  # at least, where all pairs are one expert's
# Pairs per thread whose rows wait in scratch memory to be summed over experts; no more than pre-activations are stored,
# so that memory does not grow when all experts are active, but not fewer than a few.
WINDOW = 4096
MIN_WINDOW = 1024


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
    y_TD = torch.zeros_like(x_TD)
    sizes, windows = _sizes(x_TD, down_EDF, pre_C2F, count)
    scratch = x_TD.new_empty(kernels.forward_scratch(*windows))
    inputs = _addresses(x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E)
    kernels.experts_forward(kernels.sgemm, *inputs, *sizes, *_addresses(scratch, pre_C2F, y_TD))
    return y_TD


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate."""
    dx_TD, dgate_N = torch.zeros_like(x_TD), torch.zeros_like(gate_N)
    dgate_up_E2FD, ddown_EDF = torch.empty_like(gate_up_E2FD), torch.empty_like(down_EDF)
    sizes, windows = _sizes(x_TD, down_EDF, pre_C2F, count)
    scratch = x_TD.new_empty(kernels.backward_scratch(*windows))
    inputs = _addresses(dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pre_C2F)
    outputs = _addresses(scratch, dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N)
    kernels.experts_backward(kernels.sgemm, *inputs, *sizes, *outputs)
    return dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N


def _sizes(x_TD: Tensor, down_EDF: Tensor, pre_C2F: Tensor, count: list[int]) -> tuple[tuple, tuple]:
    """(T, D, F, E, C, W, m) of the passes and (D, F, W, m) of their scratch memory.

    Blocks follow from the counts and the number of threads alone, so that both passes have the same: a pre-activation
    that is computed again is bit for bit the one that was not stored.
    """
    (T, D), (E, _, F_) = x_TD.shape, down_EDF.shape
    threads, pairs = torch.get_num_threads(), sum(count)
    block = min(BLOCK, -(-pairs // (BLOCKS_PER_THREAD * threads)), max(count, default=0))
    block = max(1, block)
    C = pre_C2F.shape[0]
    windows = max(1, -(-pairs // (WINDOW * threads)), -(-pairs // max(C, MIN_WINDOW)))
    window = -(-pairs // windows)
    return (T, D, F_, E, C, window, block), (D, F_, window, block)


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
