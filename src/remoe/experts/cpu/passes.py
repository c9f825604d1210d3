"""Arguments of the C++ functions: addresses, the active experts, and how the pairs are divided into blocks and windows.

Legend: T tokens, D model width, F expert width, E experts, C stored pairs, L active experts.
"""

import ctypes

import torch
from torch import Tensor

from remoe.experts.adapters import Adapters
from remoe.experts.contract import Problem
from remoe.experts.cpu.build import AdapterArguments, Sizes

BLOCK, MIN_BLOCK, LEAST_BLOCK = 1024, 64, 8  # pairs that one thread takes through an expert at once
BLOCKS_PER_THREAD = 2  # at least, where all pairs are one expert's
WINDOW = 4096  # pairs per thread whose rows wait in scratch memory to be summed over experts


def addresses(*tensors: Tensor) -> list[int]:
    """Where the tensors' memory begins; valid as long as they live."""
    return [tensor.data_ptr() for tensor in tensors]


def active_experts(count: list[int]) -> Tensor:
    """(3, L) int64: index, first pair and number of pairs of each expert that has any."""
    rows, start = [], 0
    for expert, pairs in enumerate(count):
        if pairs:
            rows.append((expert, start, pairs))
        start += pairs
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).t().contiguous()


def adapter_arguments(adapters: Adapters | None, gradients: Adapters | None = None) -> ctypes.Array | None:
    """What the passes are told of adapters; valid as long as the tensors live."""
    if adapters is None:
        return None
    outputs = addresses(*gradients) if gradients is not None else [0] * 4
    return AdapterArguments(*addresses(*adapters), *outputs, adapters.gate_up.rank, adapters.down.rank)


def divide(p: Problem, stored: int, count: list[int], weights: bool = True) -> ctypes.Array:
    """T, D, F, E, C and what scratch memory is for: W, m, window_factors, thread_factors, partials (see passes.cpp).

    Without `weights` (also in the forward pass) no factors of their gradients outlive a block.

    Blocks follow from the counts, C and the number of threads, so that both passes have the same, unless that number
    is changed in between: a pre-activation that is computed again is bit for bit the one that was not stored.
    """
    (T, D), (E, _, F_) = p.x_TD.shape, p.down_EDF.shape
    threads, pairs, C = torch.get_num_threads(), sum(count), stored
    block, window = BLOCK, WINDOW * threads
    if 0 < C < pairs:  # more experts are active than the target: scratch memory must not grow
        # Of many threads none has enough for a fast product, but all together must not hold more than C.
        least = max(LEAST_BLOCK, min(MIN_BLOCK, C // (4 * threads)))
        block = min(block, max(C // (10 * threads), least))
        window = min(window, threads * block if weights else max(C // 2, threads * block))
    block = max(1, min(block, -(-pairs // (BLOCKS_PER_THREAD * threads)), max(count, default=0)))
    window = min(window, pairs)
    divided = any(pairs > block for pairs in count)
    window_factors = window if divided and weights else 0
    thread_factors = block if any(0 < pairs <= block for pairs in count) or not weights else 0
    # Parts of an expert's pairs have more than half of a block.
    partials = -(-window // ((block + 1) // 2)) if divided else 0
    return Sizes(T, D, F_, E, C, window, block, window_factors, thread_factors, partials)
