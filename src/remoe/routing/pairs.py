"""The list of routed pairs where their number must not be asked for, on a GPU or in a graph, as custom operators.

On GPUs they run Triton kernels: three launches forward and one backward, where operators of torch, which run elsewhere,
take some twenty.

Legend: T tokens, E experts, N listed pairs.
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from remoe.operators import operator_name

FILL = 1024  # entries of a program
CHUNK = 4096
KERNELS = "remoe.routing.pair_kernels"  # imported on first use; an exported model's folder does not have it
MOST_ENTRIES = 8192  # of a block of tokens and all experts
AVAILABLE = (
    find_spec("triton") is not None
    and Path(__file__).with_name("pair_kernels.py").is_file()
    and os.environ.get("REMOE_KERNELS") != "0"
)


def list_pairs(gate_TE: Tensor, active_TE: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The active pairs, sorted by expert and then by token; differentiable in the gates.

    Args:
        gate_TE: (T, E) floating point.
        active_TE: (T, E) bool.
        size: N, what the number of pairs does not exceed.

    Returns:
        token_N and expert_N, int64, and gate_N: behind the pairs 0, E and zero; count_E, int64; and pair_TE, int32, the
        place of each pair in the list, -1 where there is none.
    """
    return _list_pairs(gate_TE, active_TE, size)


@torch.library.custom_op(operator_name("list_pairs"), mutates_args=())
def _list_pairs(gate_TE: Tensor, active_TE: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not _kernels_run_on(gate_TE.device):
        return _list_plainly(gate_TE, active_TE, size)
    kernels = import_module(KERNELS)
    T, E = gate_TE.shape
    token_N, expert_N = (torch.empty(size, dtype=torch.int64, device=gate_TE.device) for _ in range(2))
    gate_N, count_E = gate_TE.new_empty(size), token_N.new_empty(E)
    pair_TE = torch.empty(T, E, dtype=torch.int32, device=gate_TE.device)
    experts = 1 << (E - 1).bit_length()
    block = max(16, min(128, MOST_ENTRIES // experts))
    blocks = max(1, -(-T // block))
    count, start = (pair_TE.new_empty(E * blocks + 1) for _ in range(2))
    gate_TE, active_TE = gate_TE.contiguous(), active_TE.contiguous()
    with torch.cuda.device_of(gate_TE):
        kernels.count_block[(blocks,)](active_TE, count, T, E, blocks, EXPERTS=experts, BLOCK=block)
        kernels.sum_before[(1,)](count, start, E * blocks, CHUNK=CHUNK)
        kernels.list_pairs[(max(blocks, -(-size // FILL)),)](
            active_TE, gate_TE, start, token_N, expert_N, gate_N, pair_TE, count_E, T, E, size, blocks,
            EXPERTS=experts, BLOCK=block, FILL=FILL,
        )  # fmt: skip
    return token_N, expert_N, gate_N, count_E, pair_TE


@cache
def _kernels_run_on(device: torch.device) -> bool:
    return AVAILABLE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _list_plainly(gate_TE: Tensor, active_TE: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = gate_TE.shape
    active_ET = active_TE.t().contiguous()
    expert_N, token_N = torch.nonzero_static(active_ET, size=size, fill_value=E).unbind(dim=1)
    behind_N = expert_N == E
    entry_N = torch.where(behind_N, T * E, token_N * E + expert_N)
    gate_N = torch.cat((gate_TE.reshape(-1), gate_TE.new_zeros(1)))[entry_N]
    pair = torch.full((T * E + 1,), -1, dtype=torch.int32, device=gate_TE.device)
    pair[entry_N] = torch.arange(size, dtype=torch.int32, device=gate_TE.device)
    token_N, expert_N = token_N.masked_fill(behind_N, 0), expert_N.clone()  # outputs of an operator share no memory
    return token_N, expert_N, gate_N, active_ET.sum(dim=1), pair[:-1].clone().view(T, E)


@_list_pairs.register_fake
def _(gate_TE, active_TE, size):
    index_N = gate_TE.new_empty(size, dtype=torch.int64)
    count_E = gate_TE.new_empty(gate_TE.shape[1], dtype=torch.int64)
    pair_TE = gate_TE.new_empty(gate_TE.shape, dtype=torch.int32)
    return index_N, torch.empty_like(index_N), gate_TE.new_empty(size), count_E, pair_TE


@torch.library.custom_op(operator_name("list_pairs_backward"), mutates_args=())
def _gate_gradient(dgate_N: Tensor, pair_TE: Tensor) -> Tensor:
    if not _kernels_run_on(dgate_N.device):
        return torch.cat((dgate_N, dgate_N.new_zeros(1)))[pair_TE.long()]  # place -1 is the zero
    kernels = import_module(KERNELS)
    dgate_TE = dgate_N.new_empty(pair_TE.shape)
    entries = pair_TE.numel()
    if entries:
        with torch.cuda.device_of(dgate_N):
            kernels.gate_gradient[(-(-entries // FILL),)](dgate_N.contiguous(), pair_TE, dgate_TE, entries, BLOCK=FILL)
    return dgate_TE


@_gate_gradient.register_fake
def _(dgate_N, pair_TE):
    return dgate_N.new_empty(pair_TE.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[4])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, _token, _expert, dgate_N, _count, _pair):
    return (None if dgate_N is None else _gate_gradient(dgate_N, *ctx.saved_tensors)), None, None


_list_pairs.register_autograd(_differentiate, setup_context=_setup_context)
