"""Triton kernels that find out which tiles of pairs exist, for the products in `kernels.py`.

Legend: T tokens, E experts. A window is a slice of the list of pairs. A tile is at most ROWS pairs of one expert,
inside one window.
"""

import triton
import triton.language as tl

# What a window has to do with an expert's weight gradient.
SKIP = tl.constexpr(0)
STORE = tl.constexpr(1)
ADD = tl.constexpr(2)  # the expert began in an earlier window
# Entries of one window in `head`: tiles, pairs, first expert, number of experts.
HEAD = tl.constexpr(4)
# Entries of one tile in `tile`: expert, first pair, end; and of one expert in `span`: first pair, end, SKIP to ADD.
ENTRY = tl.constexpr(3)
# These differ from call to call; compiling anew for some of their values would not pay.
VARYING = ("window_rows", "max_tiles", "E")


@triton.jit(do_not_specialize=VARYING)
def plan_windows(
    count_ptr, head_ptr, tile_ptr, span_ptr, window_rows, max_tiles, E,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The tiles of every window and the pairs that each expert has in it. Grid: (windows, E)."""
    window = tl.program_id(0)
    mine = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    count = tl.load(count_ptr + e, mask=e < E, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    start = end - count
    window_first = window * window_rows
    window_end = window_first + window_rows
    low = tl.maximum(start, window_first)
    pairs = tl.maximum(tl.minimum(end, window_end) - low, 0)
    tiles = (pairs + ROWS - 1) // ROWS

    if mine == 0:
        first_expert = tl.sum(((e < E) & (end <= window_first)).to(tl.int32))
        last_expert = tl.sum(((e < E) & (start < window_end)).to(tl.int32))
        head = head_ptr + HEAD * window
        tl.store(head, tl.sum(tiles))
        tl.store(head + 1, tl.sum(pairs))
        # The first window also sees to the experts without any pairs.
        tl.store(head + 2, tl.where(window == 0, 0, first_expert))
        tl.store(head + 3, tl.where(window == 0, E, tl.maximum(last_expert - first_expert, 0)))

    my_low = tl.sum(tl.where(e == mine, low, 0))
    my_pairs = tl.sum(tl.where(e == mine, pairs, 0))
    my_count = tl.sum(tl.where(e == mine, count, 0))
    my_start = tl.sum(tl.where(e == mine, start, 0))
    tiles_before = tl.sum(tl.where(e < mine, tiles, 0))
    empty = tl.where((window == 0) & (my_count == 0), STORE, SKIP)
    span = span_ptr + ENTRY * (window * E + mine)
    tl.store(span, my_low)
    tl.store(span + 1, my_low + my_pairs)
    tl.store(span + 2, tl.where(my_pairs > 0, tl.where(my_start < window_first, ADD, STORE), empty))
    for base in range(0, my_pairs, SLOTS * ROWS):
        offset = base + tl.arange(0, SLOTS) * ROWS
        first = my_low + offset
        tile = tile_ptr + ENTRY * (window * max_tiles + tiles_before + offset // ROWS)
        tl.store(tile, mine, mask=offset < my_pairs)
        tl.store(tile + 1, first, mask=offset < my_pairs)
        tl.store(tile + 2, tl.minimum(first + ROWS, my_low + my_pairs), mask=offset < my_pairs)


@triton.jit(do_not_specialize=VARYING)
def place_pairs(
    token_ptr, head_ptr, tile_ptr, pair_ptr, max_tiles, E, ROWS: tl.constexpr
):  # fmt: skip
    """pair[token, expert] = the pair's place in the list. Grid: (max_tiles, windows)."""
    slot = tl.program_id(0)
    window = tl.program_id(1)
    if slot < tl.load(head_ptr + HEAD * window):
        expert, first, end = tile_at(tile_ptr, window, max_tiles, slot)
        row = first + tl.arange(0, ROWS)
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        tl.store(pair_ptr + token * E + expert, row, mask=row < end)


@triton.jit
def tile_at(tile_ptr, window, max_tiles, slot):
    tile = tile_ptr + ENTRY * (window * max_tiles + slot)
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
