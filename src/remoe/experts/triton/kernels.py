"""Triton kernels of ragged experts: the pairs are read where they lie, nothing is padded, nothing waits for the host.

Only the device knows how many pairs there are, so every grid is as large as the machine, not as the load: its programs
share the tiles that exist and end at once when there are none. `plan.py` finds out which tiles exist.

Sums are float32, each in one program and in a fixed order: two runs agree bit for bit.

A product's width is cut into FULL tiles and, where half a tile holds what remains, a narrow one; the programs come to
the narrow ones last.

Legend: T tokens, D model width, F expert width, E experts. A window is a slice of the list of pairs; the rows of its
scratch memory count from the slice's start. A tile is at most ROWS pairs of one expert, inside one window.
"""

import triton
import triton.language as tl

from remoe.experts.triton.plan import ADD, ENTRY, HEAD, SKIP, tile_at

# As in `plan.py`.
VARYING = ("window", "window_rows", "max_tiles", "pre_first", "pre_end", "T", "E", "listed")


@triton.jit
def _locate(item, height, width, GROUP: tl.constexpr):
    # Down GROUP tiles, then one to the right: what runs at a time shares its rows and its columns in L2.
    band = item // (GROUP * width)
    top = band * GROUP
    size = tl.minimum(height - top, GROUP)
    within = item % (GROUP * width)
    return top + within % size, within // size


@triton.jit
def _next_program(items):
    # Where this program goes on in the next list of items, when the last one had so many.
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - items % programs) % programs


@triton.jit
def _columns(row_ptrs, first, K: tl.constexpr, DEPTH: tl.constexpr):
    # DEPTH columns from `first` on of the rows that begin at `row_ptrs`, each of K numbers; zeros behind them.
    k = first + tl.arange(0, DEPTH)
    if K % DEPTH == 0:
        return tl.load(row_ptrs[:, None] + k[None, :])
    else:
        return tl.load(row_ptrs[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)


@triton.jit
def _block(
    matrix, top, row, column, M, N: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    # HEIGHT x WIDTH numbers from (row, column) on of the (M, N) matrix that begins with row `top` of `matrix`; zeros
    # outside of it, but where DESCRIBED, the rows behind its M are those of the matrix that follows.
    # The branches are closed ones: the compiler reads what stands behind a return.
    if DESCRIBED:
        return matrix.load([top + row, column])
    else:
        i = row + tl.arange(0, HEIGHT)
        j = column + tl.arange(0, WIDTH)
        block_ptrs = matrix + ((tl.cast(top, tl.int64) + i) * N)[:, None] + j[None, :]
        if N % WIDTH == 0:
            return tl.load(block_ptrs, mask=(i < M)[:, None], other=0.0)
        else:
            return tl.load(block_ptrs, mask=(i < M)[:, None] & (j < N)[None, :], other=0.0)


@triton.jit(do_not_specialize=VARYING)
def up_projection(
    x_ptr, weight, narrow_weight, gate_ptr, token_ptr, head_ptr, tile_ptr, pre_ptr, hidden_ptr,
    window, window_rows, max_tiles, pre_first, pre_end,
    D: tl.constexpr, F: tl.constexpr, HIDDEN: tl.constexpr, DESCRIBED: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """pre = x[token] @ gate_up[e]^T; hidden = silu(pre's gate) * pre's up * the router's gate, where HIDDEN.

    Of pre, the rows before pre_end are kept; row 0 of its memory is the pair pre_first. A tile's columns are HALF gate
    columns and the up columns that belong to them, the operands of SwiGLU.
    """
    HALF: tl.constexpr = COLUMNS // 2
    tiles = tl.load(head_ptr + HEAD * window)
    for item in range(tl.program_id(0), tiles * FULL, tl.num_programs(0)):
        slot, n = _locate(item, tiles, FULL, GROUP)
        _up_projection(
            x_ptr, weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, hidden_ptr,
            window, window_rows, max_tiles, pre_first, pre_end, slot, n * HALF,
            D, F, HIDDEN, DESCRIBED, ROWS, HALF, DEPTH,
        )  # fmt: skip
    if FULL * HALF < F:
        for slot in range(_next_program(tiles * FULL), tiles, tl.num_programs(0)):
            _up_projection(
                x_ptr, narrow_weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, hidden_ptr,
                window, window_rows, max_tiles, pre_first, pre_end, slot, FULL * HALF,
                D, F, HIDDEN, DESCRIBED, ROWS, HALF // 2, DEPTH,
            )  # fmt: skip


@triton.jit
def _up_projection(
    x_ptr, weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, hidden_ptr,
    window, window_rows, max_tiles, pre_first, pre_end, slot, column,
    D: tl.constexpr, F: tl.constexpr, HIDDEN: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # One tile, HALF columns of gate and up from `column` on.
    expert, first, end = tile_at(tile_ptr, window, max_tiles, slot)
    row = first + tl.arange(0, ROWS)
    # Rows behind the tile read token 0 and are not stored.
    x_ptrs = x_ptr + tl.load(token_ptr + row, mask=row < end, other=0) * D
    a = tl.zeros((ROWS, HALF), tl.float32)
    b = tl.zeros((ROWS, HALF), tl.float32)
    for k in range(0, D, DEPTH):
        x = _columns(x_ptrs, k, D, DEPTH)
        gate_weight = _block(weight, expert * 2 * F, column, k, F, D, HALF, DEPTH, DESCRIBED)
        a = tl.dot(x, tl.trans(gate_weight), a, input_precision="ieee")
        up_weight = _block(weight, expert * 2 * F + F, column, k, F, D, HALF, DEPTH, DESCRIBED)
        b = tl.dot(x, tl.trans(up_weight), b, input_precision="ieee")

    f = column + tl.arange(0, HALF)
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


@triton.jit(do_not_specialize=VARYING)
def project(
    rows, weight, head_ptr, tile_ptr, out_ptr, window, window_rows, max_tiles,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = rows @ weight[e] (K, N), or rows @ weight[e]^T (N, K) where TRANSPOSED."""
    width: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tiles = tl.load(head_ptr + HEAD * window)
    # Flattened, a program reads its next tile's blocks while it writes the last one's.
    for item in tl.range(tl.program_id(0), tiles * width, tl.num_programs(0), flatten=DESCRIBED):
        slot, n = _locate(item, tiles, width, GROUP)
        expert, first, end = tile_at(tile_ptr, window, max_tiles, slot)
        low, high = first - window * window_rows, end - window * window_rows
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            left = _block(rows, 0, low, k, high, K, ROWS, DEPTH, DESCRIBED)
            if TRANSPOSED:
                right = tl.trans(_block(weight, expert * N, n * COLUMNS, k, N, K, COLUMNS, DEPTH, DESCRIBED))
            else:
                right = _block(weight, expert * K, k, n * COLUMNS, K, N, DEPTH, COLUMNS, DESCRIBED)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        row = low + tl.arange(0, ROWS)
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row < high)[:, None] & (column < N)[None, :])


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
            row_ptrs = rows_ptr + d
            last = first - 1
            for _ in range(0, pairs, 4):  # four rows are under way at a time
                one = _next_pair(pair, last)
                two = _next_pair(pair, one)
                three = _next_pair(pair, two)
                last = _next_pair(pair, three)
                a = _pair_row(row_ptrs, one, first, window_rows, d < D, D)
                b = _pair_row(row_ptrs, two, first, window_rows, d < D, D)
                c = _pair_row(row_ptrs, three, first, window_rows, d < D, D)
                acc = acc + a + b + c + _pair_row(row_ptrs, last, first, window_rows, d < D, D)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _next_pair(pair, last):
    # The token's next place in the list: places grow with the expert.
    return tl.min(tl.where(pair > last, pair, 2147483647))


@triton.jit
def _pair_row(row_ptrs, pair, first, window_rows, inside, D: tl.constexpr):
    # Zeros where the pair is in a later window, or there is none.
    row = pair - first
    inside = inside & (tl.full(inside.shape, row, tl.int32) < window_rows)
    return tl.load(row_ptrs + row.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def hidden_gradient(
    dy_ptr, weight, narrow_weight, gate_ptr, token_ptr, head_ptr, tile_ptr, pre_ptr, dpre_ptr, hidden_ptr, dgate_ptr,
    window, window_rows, max_tiles, pre_first, listed,
    D: tl.constexpr, F: tl.constexpr, DESCRIBED: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dy[token] @ down[e], and through SwiGLU: the gradient of pre, the gated hidden activation, and dgate.

    dgate holds one partial sum per COLUMNS of F and listed pair, which `sum_gate_gradient` adds. pre may be the memory
    of dpre. Behind the window's last pair come zeros to the end of its tile.
    """
    tiles = tl.load(head_ptr + HEAD * window)
    for item in range(tl.program_id(0), tiles * FULL, tl.num_programs(0)):
        slot, n = _locate(item, tiles, FULL, GROUP)
        _hidden_gradient(
            dy_ptr, weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, dpre_ptr, hidden_ptr,
            dgate_ptr + n.to(tl.int64) * listed, window, window_rows, max_tiles, pre_first, slot, tiles, n * COLUMNS,
            D, F, DESCRIBED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    if FULL * COLUMNS < F:
        for slot in range(_next_program(tiles * FULL), tiles, tl.num_programs(0)):
            _hidden_gradient(
                dy_ptr, narrow_weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, dpre_ptr, hidden_ptr,
                dgate_ptr + tl.cast(FULL, tl.int64) * listed,
                window, window_rows, max_tiles, pre_first, slot, tiles, FULL * COLUMNS,
                D, F, DESCRIBED, ROWS, COLUMNS // 2, DEPTH,
            )  # fmt: skip


@triton.jit
def _hidden_gradient(
    dy_ptr, weight, gate_ptr, token_ptr, tile_ptr, pre_ptr, dpre_ptr, hidden_ptr, dgate_ptr,
    window, window_rows, max_tiles, pre_first, slot, tiles, column,
    D: tl.constexpr, F: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # One tile, COLUMNS from `column` on.
    expert, first, end = tile_at(tile_ptr, window, max_tiles, slot)
    row = first + tl.arange(0, ROWS)
    local = (row - window * window_rows).to(tl.int64)
    dy_ptrs = dy_ptr + tl.load(token_ptr + row, mask=row < end, other=0) * D
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, D, DEPTH):
        down = _block(weight, expert * D, k, column, D, F, DEPTH, COLUMNS, DESCRIBED)
        acc = tl.dot(_columns(dy_ptrs, k, D, DEPTH), down, acc, input_precision="ieee")

    gate = tl.load(gate_ptr + row, mask=row < end, other=0.0)
    pre_ptrs = pre_ptr + (row - pre_first).to(tl.int64) * 2 * F
    dpre_ptrs, hidden_ptrs = dpre_ptr + local * 2 * F, hidden_ptr + local * F
    written = row < tl.where(slot == tiles - 1, first + ROWS, end)
    dgate = _swiglu_gradient(acc, gate, row < end, written, column, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
    tl.store(dgate_ptr + row, dgate, mask=row < end)


@triton.jit
def _halves(tile):
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _swiglu_gradient(
    dhidden, gate, valid, written, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F: tl.constexpr
):  # fmt: skip
    # Of the columns from `first` on; returns dgate's sum over them. Rows that are not valid have zero gate.
    columns: tl.constexpr = dhidden.shape[1]
    if columns > 32:  # more than the registers hold, with all that stands below
        low, high = _halves(dhidden)
        dgate = _swiglu_gradient(low, gate, valid, written, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
        first += columns // 2
        return dgate + _swiglu_gradient(high, gate, valid, written, first, pre_ptrs, dpre_ptrs, hidden_ptrs, F)
    f = first + tl.arange(0, columns)
    inside = valid[:, None] & (f < F)[None, :]
    written = written[:, None] & (f < F)[None, :]
    pre_ptrs = pre_ptrs[:, None] + f[None, :]
    a = tl.load(pre_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pre_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # pre may be the memory of dpre
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    dgate = tl.sum(dhidden * silu * b, axis=1)
    hidden = silu * b * gate[:, None]
    tl.store(hidden_ptrs[:, None] + f[None, :], hidden.to(hidden_ptrs.dtype.element_ty), mask=written)
    dhidden *= gate[:, None]
    # d silu(a) / da = sigmoid + silu * (1 - sigmoid)
    da = dhidden * b * (sigmoid + silu * (1 - sigmoid))
    dpre_ptrs = dpre_ptrs[:, None] + f[None, :]
    tl.store(dpre_ptrs, da.to(dpre_ptrs.dtype.element_ty), mask=written)
    tl.store(dpre_ptrs + F, (dhidden * silu).to(dpre_ptrs.dtype.element_ty), mask=written)
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
    rows, narrow_rows, tokens_ptr, token_ptr, head_ptr, span_ptr, out_ptr, window, window_rows, E,
    M: tl.constexpr, N: tl.constexpr, UP: tl.constexpr, DESCRIBED: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] (M, N) over the expert's pairs; experts without pairs get zeros.

    For gate_up, where UP, rows^T @ tokens[token]: of dpre and x. For down, tokens[token]^T @ rows: of dy and hidden.
    The rows behind a DESCRIBED expert's meet zeros: they must be numbers.
    """
    width: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    first_expert = tl.load(head_ptr + HEAD * window + 2)
    items = tl.load(head_ptr + HEAD * window + 3) * FULL * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        m, n = _locate(item % (FULL * width), FULL, width, GROUP)
        _weight_gradient(
            rows, tokens_ptr, token_ptr, span_ptr, out_ptr, window, window_rows, E,
            first_expert + item // (FULL * width), m * ROWS, n * COLUMNS,
            M, N, UP, DESCRIBED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    if FULL * ROWS < M:
        for item in range(_next_program(items), items // FULL, tl.num_programs(0)):
            _weight_gradient(
                narrow_rows, tokens_ptr, token_ptr, span_ptr, out_ptr, window, window_rows, E,
                first_expert + item // width, FULL * ROWS, item % width * COLUMNS,
                M, N, UP, DESCRIBED, ROWS // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit
def _weight_gradient(
    rows, tokens_ptr, token_ptr, span_ptr, out_ptr, window, window_rows, E, expert, top, column,
    M: tl.constexpr, N: tl.constexpr, UP: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # One tile, ROWS from `top` and COLUMNS from `column` on.
    span = span_ptr + ENTRY * (window * E + expert)
    low, high, what = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    if what != SKIP:
        i = top + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(low, high, DEPTH):
            row = first + tl.arange(0, DEPTH)
            token = tl.load(token_ptr + row, mask=row < high, other=0)
            base, end = first - window * window_rows, high - window * window_rows
            if UP:
                left = _block(rows, 0, base, top, end, M, DEPTH, ROWS, DESCRIBED)
                inside = (row < high)[:, None] & (j < N)[None, :]
                right = tl.load(tokens_ptr + (token[:, None] * N + j[None, :]), mask=inside, other=0.0)
            else:
                inside = (row < high)[:, None] & (i < M)[None, :]
                left = tl.load(tokens_ptr + (token[:, None] * M + i[None, :]), mask=inside, other=0.0)
                right = _block(rows, 0, base, column, end, N, DEPTH, COLUMNS, DESCRIBED)
            acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
        out_row = expert.to(tl.int64) * M + i
        out_ptrs = out_ptr + out_row[:, None] * N + j[None, :]
        inside = (i < M)[:, None] & (j < N)[None, :]
        if what == ADD:
            acc += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
