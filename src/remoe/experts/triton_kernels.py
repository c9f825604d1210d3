"""Triton kernels of ragged experts: the pairs are read where they lie, nothing is padded, nothing waits for the host.

Only the device knows how many pairs there are, so every grid is as large as the machine, not as the load: its programs
share the tiles that exist and end at once when there are none. `plan_windows` finds out which tiles exist.

Sums are float32, each in one program and in a fixed order: two runs agree bit for bit.

Legend: T tokens, D model width, F expert width, E experts. A window is a slice of the list of pairs; the rows of its
scratch memory count from the slice's start. A tile is at most ROWS pairs of one expert, inside one window.
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
VARYING = ("window", "window_rows", "max_tiles", "pre_first", "pre_end", "T", "E", "listed")


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
def list_pairs(
    token_ptr, head_ptr, tile_ptr, pair_ptr, max_tiles, E, ROWS: tl.constexpr
):  # fmt: skip
    """pair[token, expert] = the pair's place in the list. Grid: (max_tiles, windows)."""
    slot = tl.program_id(0)
    window = tl.program_id(1)
    if slot < tl.load(head_ptr + HEAD * window):
        expert, first, end = _tile(tile_ptr, window, max_tiles, slot)
        row = first + tl.arange(0, ROWS)
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        tl.store(pair_ptr + token * E + expert, row, mask=row < end)


@triton.jit
def _tile(tile_ptr, window, max_tiles, slot):
    tile = tile_ptr + ENTRY * (window * max_tiles + slot)
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)


@triton.jit
def _locate(item, height, width, GROUP: tl.constexpr):
    # Down GROUP tiles, then one to the right: what runs at a time shares its rows and its columns in L2.
    band = item // (GROUP * width)
    top = band * GROUP
    size = tl.minimum(height - top, GROUP)
    within = item % (GROUP * width)
    return top + within % size, within // size


@triton.jit
def _product(
    a_ptrs, b_ptrs, b_columns, acc, b_step, K: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    # acc + a @ b, where the pointers are those of the first DEPTH of K; b_columns masks b's columns.
    k = tl.arange(0, DEPTH)
    for base in range(0, K, DEPTH):
        if K % DEPTH == 0:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs, mask=b_columns[None, :], other=0.0)
        else:
            inside = base + k < K
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None] & b_columns[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += DEPTH
        b_ptrs += b_step
    return acc


@triton.jit(do_not_specialize=VARYING)
def up_projection(
    x_ptr, weight_ptr, gate_ptr, token_ptr, head_ptr, tile_ptr, pre_ptr, hidden_ptr,
    window, window_rows, max_tiles, pre_first, pre_end,
    D: tl.constexpr, F: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """pre = x[token] @ gate_up[e]^T; hidden = silu(pre's gate) * pre's up * the router's gate, where HIDDEN.

    Of pre, the rows before pre_end are kept; row 0 of its memory is the pair pre_first. A tile's columns are HALF gate
    columns and the up columns that belong to them: one product yields both operands of SwiGLU.
    """
    HALF: tl.constexpr = COLUMNS // 2
    width: tl.constexpr = (F + HALF - 1) // HALF
    tiles = tl.load(head_ptr + HEAD * window)
    k = tl.arange(0, DEPTH)
    column = tl.arange(0, COLUMNS)
    for item in range(tl.program_id(0), tiles * width, tl.num_programs(0)):
        slot, n = _locate(item, tiles, width, GROUP)
        expert, first, end = _tile(tile_ptr, window, max_tiles, slot)
        row = first + tl.arange(0, ROWS)
        # Rows behind the tile read token 0 and are not stored.
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        inside = n * HALF + column % HALF < F
        weight_row = expert.to(tl.int64) * 2 * F + n * HALF + column % HALF + column // HALF * F
        a_ptrs = x_ptr + (token[:, None] * D + k[None, :])
        b_ptrs = weight_ptr + (weight_row[None, :] * D + k[:, None])
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        acc = _product(a_ptrs, b_ptrs, inside, acc, DEPTH, D, DEPTH)

        a, b = _halves(acc)
        f = n * HALF + tl.arange(0, HALF)
        valid = (row < end)[:, None] & (f < F)[None, :]
        if HIDDEN:
            gate = tl.load(gate_ptr + row, mask=row < end, other=0.0)
            hidden = a * tl.sigmoid(a) * b * gate[:, None]
            hidden_ptrs = hidden_ptr + (row - window * window_rows).to(tl.int64)[:, None] * F + f[None, :]
            tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=valid)
        if first < pre_end:
            valid = valid & (row < pre_end)[:, None]
            pre_ptrs = pre_ptr + (row - pre_first).to(tl.int64)[:, None] * 2 * F + f[None, :]
            tl.store(pre_ptrs, a.to(pre_ptr.dtype.element_ty), mask=valid)
            tl.store(pre_ptrs + F, b.to(pre_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _halves(tile):
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=VARYING)
def project(
    rows_ptr, weight_ptr, head_ptr, tile_ptr, out_ptr, window, window_rows, max_tiles,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = rows @ weight[e] (K, N), or rows @ weight[e]^T (N, K) where TRANSPOSED."""
    width: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tiles = tl.load(head_ptr + HEAD * window)
    k = tl.arange(0, DEPTH)
    for item in range(tl.program_id(0), tiles * width, tl.num_programs(0)):
        slot, n = _locate(item, tiles, width, GROUP)
        expert, first, end = _tile(tile_ptr, window, max_tiles, slot)
        row = first + tl.arange(0, ROWS)
        local = (row - window * window_rows).to(tl.int64)
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        # Rows behind the tile read its first row and are not stored.
        source = tl.where(row < end, row, first) - window * window_rows
        a_ptrs = rows_ptr + (source.to(tl.int64)[:, None] * K + k[None, :])
        weight = weight_ptr + expert.to(tl.int64) * K * N
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        if TRANSPOSED:
            b_ptrs = weight + (column[None, :] * K + k[:, None])
            acc = _product(a_ptrs, b_ptrs, column < N, acc, DEPTH, K, DEPTH)
        else:
            b_ptrs = weight + (k[:, None] * N + column[None, :])
            acc = _product(a_ptrs, b_ptrs, column < N, acc, DEPTH * N, K, DEPTH)
        out_ptrs = out_ptr + local[:, None] * N + column[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=VARYING)
def combine(
    rows_ptr, head_ptr, pair_ptr, out_ptr, window, window_rows, T, E,
    D: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = the sum of the token's rows, expert by expert; later windows add to what the earlier ones left."""
    width: tl.constexpr = (D + BLOCK - 1) // BLOCK
    first = window * window_rows
    items = tl.where((window == 0) | (tl.load(head_ptr + HEAD * window + 1) > 0), T * width, 0)
    e = tl.arange(0, EXPERTS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token = tl.cast(item // width, tl.int64)
        pair = tl.load(pair_ptr + token * E + e, mask=e < E, other=-1)
        here = (pair >= first) & (pair < first + window_rows)
        pairs = tl.sum(here.to(tl.int32))
        if (window == 0) | (pairs > 0):
            d = item % width * BLOCK + tl.arange(0, BLOCK)
            out_ptrs = out_ptr + token * D + d
            acc = tl.zeros((BLOCK,), tl.float32)
            if window > 0:
                acc += tl.load(out_ptrs, mask=d < D, other=0.0).to(tl.float32)
            last = first - 1
            for _ in range(pairs):
                # Places in the list grow with the expert.
                last = tl.min(tl.where(pair > last, pair, 2147483647))
                row = (last - first).to(tl.int64)
                acc += tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=VARYING)
def hidden_gradient(
    dy_ptr, weight_ptr, gate_ptr, token_ptr, head_ptr, tile_ptr, pre_ptr, dpre_ptr, hidden_ptr, dgate_ptr,
    window, window_rows, max_tiles, pre_first, listed,
    D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dy[token] @ down[e], and through SwiGLU: the gradient of pre, the gated hidden activation, and dgate.

    dgate holds one partial sum per COLUMNS of F and listed pair, which `sum_gate_gradient` adds. pre may be the memory
    of dpre.
    """
    width: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    tiles = tl.load(head_ptr + HEAD * window)
    k = tl.arange(0, DEPTH)
    for item in range(tl.program_id(0), tiles * width, tl.num_programs(0)):
        slot, n = _locate(item, tiles, width, GROUP)
        expert, first, end = _tile(tile_ptr, window, max_tiles, slot)
        row = first + tl.arange(0, ROWS)
        local = (row - window * window_rows).to(tl.int64)
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        f = n * COLUMNS + tl.arange(0, COLUMNS)
        a_ptrs = dy_ptr + (token[:, None] * D + k[None, :])
        b_ptrs = weight_ptr + (expert.to(tl.int64) * D * F + (k[:, None] * F + f[None, :]))
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        acc = _product(a_ptrs, b_ptrs, f < F, acc, DEPTH * F, D, DEPTH)

        gate = tl.load(gate_ptr + row, mask=row < end, other=0.0)
        pre_ptrs = pre_ptr + (row - pre_first).to(tl.int64) * 2 * F
        dpre_ptrs, hidden_ptrs = dpre_ptr + local * 2 * F, hidden_ptr + local * F
        dgate = _swiglu_gradient(acc, gate, row < end, n * COLUMNS, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
        tl.store(dgate_ptr + n.to(tl.int64) * listed + row, dgate, mask=row < end)


@triton.jit
def _swiglu_gradient(
    dhidden, gate, valid, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F: tl.constexpr
):  # fmt: skip
    # Of the columns from `first` on; returns dgate's sum over them.
    columns: tl.constexpr = dhidden.shape[1]
    if columns > 32:  # more than the registers hold, with all that stands below
        low, high = _halves(dhidden)
        dgate = _swiglu_gradient(low, gate, valid, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
        first += columns // 2
        return dgate + _swiglu_gradient(high, gate, valid, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
    f = first + tl.arange(0, columns)
    inside = valid[:, None] & (f < F)[None, :]
    pre_ptrs = pre_ptrs[:, None] + f[None, :]
    a = tl.load(pre_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pre_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # pre may be the memory of dpre
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    dgate = tl.sum(dhidden * silu * b, axis=1)
    hidden = silu * b * gate[:, None]
    tl.store(hidden_ptrs[:, None] + f[None, :], hidden.to(hidden_ptrs.dtype.element_ty), mask=inside)
    dhidden *= gate[:, None]
    # d silu(a) / da = sigmoid + silu * (1 - sigmoid)
    da = dhidden * b * (sigmoid + silu * (1 - sigmoid))
    dpre_ptrs = dpre_ptrs[:, None] + f[None, :]
    tl.store(dpre_ptrs, da.to(dpre_ptrs.dtype.element_ty), mask=inside)
    tl.store(dpre_ptrs + F, (dhidden * silu).to(dpre_ptrs.dtype.element_ty), mask=inside)
    return dgate


@triton.jit(do_not_specialize=VARYING)
def sum_gate_gradient(
    part_ptr, pairs_ptr, dgate_ptr, listed, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dgate of all pairs from the partial sums over F, zero behind them. Grid: at least listed / BLOCK."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(pairs_ptr)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        acc += tl.load(part_ptr + tl.cast(part, tl.int64) * listed + row, mask=inside, other=0.0)
    tl.store(dgate_ptr + row, acc, mask=row < listed)


@triton.jit(do_not_specialize=VARYING)
def weight_gradient(
    left_ptr, right_ptr, token_ptr, head_ptr, span_ptr, out_ptr, window, window_rows, E,
    M: tl.constexpr, N: tl.constexpr, UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] (M, N) = left^T @ right over the expert's pairs; experts without pairs get zeros.

    left, right: dpre, x[token] where UP, for gate_up; dy[token], hidden for down.
    """
    height: tl.constexpr = (M + ROWS - 1) // ROWS
    width: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    first_expert = tl.load(head_ptr + HEAD * window + 2)
    experts = tl.load(head_ptr + HEAD * window + 3)
    for item in range(tl.program_id(0), experts * height * width, tl.num_programs(0)):
        expert = first_expert + item // (height * width)
        m, n = _locate(item % (height * width), height, width, GROUP)
        span = span_ptr + ENTRY * (window * E + expert)
        low, high, what = tl.load(span), tl.load(span + 1), tl.load(span + 2)
        if what != SKIP:
            i = m * ROWS + tl.arange(0, ROWS)
            j = n * COLUMNS + tl.arange(0, COLUMNS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for base in range(low, high, DEPTH):
                row = base + tl.arange(0, DEPTH)
                token = tl.load(token_ptr + row, mask=row < high, other=0)
                local = (row - window * window_rows).to(tl.int64)
                left_row, right_row = (local, token) if UP else (token, local)
                left_ptrs = left_ptr + (left_row[:, None] * M + i[None, :])
                right_ptrs = right_ptr + (right_row[:, None] * N + j[None, :])
                left = tl.load(left_ptrs, mask=(row < high)[:, None] & (i < M)[None, :], other=0.0)
                right = tl.load(right_ptrs, mask=(row < high)[:, None] & (j < N)[None, :], other=0.0)
                acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
            out_row = expert.to(tl.int64) * M + i
            out_ptrs = out_ptr + out_row[:, None] * N + j[None, :]
            inside = (i < M)[:, None] & (j < N)[None, :]
            if what == ADD:
                acc += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
