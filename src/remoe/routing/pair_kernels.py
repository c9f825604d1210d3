"""Triton kernels that list the routed pairs, sorted by expert and token, without waiting for their number.

Legend: T tokens, E experts, N listed pairs, B blocks of BLOCK tokens.
"""

import triton
import triton.language as tl

# These differ from call to call; compiling anew for some of their values would not pay.
VARYING = ("T", "E", "N", "blocks", "entries")


@triton.jit(do_not_specialize=VARYING)
def count_block(active_ptr, count_ptr, T, E, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """count[e, b] (E, B): the active pairs of an expert in a block of tokens. Grid: (B,)."""
    block = tl.program_id(0)
    active, e = _active(active_ptr, block, T, E, EXPERTS, BLOCK)
    tl.store(count_ptr + e * blocks + block, tl.sum(active, axis=0), mask=e < E)


@triton.jit
def _active(active_ptr, block, T, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    t = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EXPERTS)
    place = t.to(tl.int64)[:, None] * E + e[None, :]
    active = tl.load(active_ptr + place, mask=(t < T)[:, None] & (e < E)[None, :], other=0)
    return active.to(tl.int32), e


@triton.jit(do_not_specialize=VARYING)
def sum_before(count_ptr, start_ptr, entries, CHUNK: tl.constexpr):
    """start[i] = the sum of count[:i]; `entries` of them, and their sum behind the last. Grid: (1,)."""
    total = tl.zeros((), tl.int32)
    for first in range(0, entries, CHUNK):
        i = first + tl.arange(0, CHUNK)
        count = tl.load(count_ptr + i, mask=i < entries, other=0)
        tl.store(start_ptr + i, total + tl.cumsum(count, 0) - count, mask=i < entries)
        total += tl.sum(count)
    tl.store(start_ptr + entries, total)


@triton.jit(do_not_specialize=VARYING)
def list_pairs(
    active_ptr, gate_ptr, start_ptr, token_ptr, expert_ptr, listed_ptr, pair_ptr, total_ptr, T, E, N, blocks,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The lists of tokens, experts and gates, the place of each pair in them, and each expert's number of pairs.

    Entries behind the pairs get token 0, expert E and gate zero. Grid: at least (B,), and enough for N by FILL each.
    """
    program = tl.program_id(0)
    if program < blocks:
        active, e = _active(active_ptr, program, T, E, EXPERTS, BLOCK)
        t = program * BLOCK + tl.arange(0, BLOCK)
        start = tl.load(start_ptr + e * blocks + program, mask=e < E, other=0)
        place = start[None, :] + tl.cumsum(active, 0) - active
        entry = t.to(tl.int64)[:, None] * E + e[None, :]
        inside = (t < T)[:, None] & (e < E)[None, :]
        tl.store(pair_ptr + entry, tl.where(active > 0, place, -1), mask=inside)
        inside = inside & (active > 0) & (place < N)
        tl.store(token_ptr + place, t.to(tl.int64)[:, None] + tl.zeros_like(entry), mask=inside)
        tl.store(expert_ptr + place, e.to(tl.int64)[None, :] + tl.zeros_like(entry), mask=inside)
        tl.store(listed_ptr + place, tl.load(gate_ptr + entry, mask=inside, other=0.0), mask=inside)
    if program == 0:
        e = tl.arange(0, EXPERTS)
        first = tl.load(start_ptr + e * blocks, mask=e < E, other=0)
        end = tl.load(start_ptr + (e + 1) * blocks, mask=e < E, other=0)
        tl.store(total_ptr + e, (end - first).to(tl.int64), mask=e < E)
    row = program * FILL + tl.arange(0, FILL)
    behind = (row >= tl.load(start_ptr + E * blocks)) & (row < N)
    tl.store(token_ptr + row, tl.zeros((FILL,), tl.int64), mask=behind)
    tl.store(expert_ptr + row, tl.zeros((FILL,), tl.int64) + E, mask=behind)
    tl.store(listed_ptr + row, tl.zeros((FILL,), listed_ptr.dtype.element_ty), mask=behind)


@triton.jit(do_not_specialize=VARYING)
def gate_gradient(dlisted_ptr, pair_ptr, dgate_ptr, entries, BLOCK: tl.constexpr):
    """dgate[i] = the gradient at the pair's place in the list, zero where there is no pair. Grid: entries / BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pair_ptr + i, mask=i < entries, other=-1)
    tl.store(dgate_ptr + i, tl.load(dlisted_ptr + pair, mask=pair >= 0, other=0.0), mask=i < entries)
