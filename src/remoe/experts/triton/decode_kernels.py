"""Triton kernels of a layer on a few tokens, without lists of pairs: two launches, from x and the router's weight to y.

Every program of both computes or reads all gates and finds from them which experts have a token, so that programs share
the tiles of these experts alone, and neither launch waits for the host or depends on the load. Sums are float32, each
in one program and in the order of the experts: two runs agree bit for bit.

Legend: T tokens, D model width, F expert width, E experts.
"""

import triton
import triton.language as tl

# How gates follow from logits; see `remoe.routing.base.GateRule`. GIVEN: they are an input.
GIVEN, RELU, SOFTMAX, SIGMOID, CUTOFF = (tl.constexpr(kind) for kind in range(5))
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
VARYING = ("T",)


@triton.jit
def _block(matrix_ptr, row, rows, column, K: tl.constexpr, DEPTH: tl.constexpr):
    # Rows `row` (a vector) and DEPTH columns from `column` on of a (rows, K) matrix; zeros outside of it.
    k = column + tl.arange(0, DEPTH)
    inside = (row < rows)[:, None] & (k < K)[None, :]
    return tl.load(matrix_ptr + row.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _largest(score_TE, K: tl.constexpr, EXPERTS: tl.constexpr):
    # Which are the K largest of each row, of equal ones the first; NaN counts as the largest, so that it stays visible.
    e = tl.arange(0, EXPERTS)[None, :]
    left_TE = tl.where(score_TE == score_TE, score_TE, float("inf"))
    chosen_TE = left_TE != left_TE
    for _ in range(K):
        best_T = tl.max(left_TE, axis=1)
        first_T = tl.min(tl.where((left_TE == best_T[:, None]) & ~chosen_TE, e, EXPERTS), axis=1)
        now_TE = e == first_T[:, None]
        chosen_TE = chosen_TE | now_TE
        left_TE = tl.where(now_TE, float("-inf"), left_TE)
    return chosen_TE


@triton.jit
def _make_gates(
    x_ptr, router_ptr, bias_ptr, each_ptr, T, scale,
    E: tl.constexpr, D: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BIAS: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # (TOKENS, EXPERTS) float32: the gates of a router at evaluation.
    t, e = tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    real_E = e < E
    logits_TE = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for column in range(0, D, DEPTH):
        x = _block(x_ptr, t, T, column, D, DEPTH)
        router = _block(router_ptr, e, E, column, D, DEPTH)
        if x.dtype != router.dtype:
            x, router = x.to(tl.float32), router.to(tl.float32)
        logits_TE = tl.dot(x, tl.trans(router), logits_TE, input_precision="ieee")
    if BIAS:
        logits_TE += tl.load(bias_ptr + e, mask=real_E, other=0.0).to(tl.float32)[None, :]
    each_E = tl.zeros((EXPERTS,), tl.float32)
    if EACH:
        each_E = tl.load(each_ptr + e, mask=real_E, other=0.0).to(tl.float32)
    if RULE == RELU:
        gate_TE = tl.where(logits_TE <= 0, 0.0, logits_TE) * scale
        if EACH:
            gate_TE = gate_TE * each_E[None, :]
    elif RULE == SOFTMAX:
        logits_TE = tl.where(real_E[None, :], logits_TE, float("-inf"))
        power_TE = tl.exp(logits_TE - tl.max(logits_TE, axis=1)[:, None])
        gate_TE = power_TE / tl.sum(power_TE, axis=1)[:, None]
        gate_TE = tl.where(_largest(tl.where(real_E[None, :], gate_TE, -1.0), K, EXPERTS), gate_TE, 0.0)
        if RENORMALIZE:
            gate_TE = gate_TE / tl.maximum(tl.sum(gate_TE, axis=1), TINY)[:, None]
        gate_TE = gate_TE * scale
    elif RULE == SIGMOID:
        score_TE = tl.sigmoid(logits_TE)
        chosen_TE = _largest(tl.where(real_E[None, :], score_TE + each_E[None, :], float("-inf")), K, EXPERTS)
        score_TE = tl.where(chosen_TE, score_TE, 0.0)
        gate_TE = score_TE * scale
        if RENORMALIZE:
            gate_TE = gate_TE / tl.maximum(tl.sum(score_TE, axis=1), TINY)[:, None]
    else:
        score_TE = tl.sigmoid(logits_TE)
        gate_TE = score_TE
        if K < E:
            gate_TE = tl.where(score_TE <= each_E[None, :], 0.0, score_TE)
    return tl.where(real_E[None, :], gate_TE, 0.0)


@triton.jit
def _read_gates(gate_ptr, T, E: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    t, e = tl.arange(0, TOKENS)[:, None], tl.arange(0, EXPERTS)[None, :]
    return tl.load(gate_ptr + t * E + e, mask=(t < T) & (e < E), other=0.0).to(tl.float32)


@triton.jit
def _active(gate_TE):
    # The number of experts with a token, and for each expert its place among them, -1 for one without.
    active_E = tl.max((gate_TE != 0).to(tl.int32), axis=0)
    return tl.sum(active_E), tl.where(active_E > 0, tl.cumsum(active_E, 0) - 1, -1)


@triton.jit
def _hidden(
    x_ptr, gate_up_ptr, expert, column, T, D: tl.constexpr, F: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # (TOKENS, COLUMNS) float32: SwiGLU of one expert, columns from `column` on.
    t, f = tl.arange(0, TOKENS), column + tl.arange(0, COLUMNS)
    up_ptr = gate_up_ptr + tl.cast(expert, tl.int64) * 2 * F * D
    a = tl.zeros((TOKENS, COLUMNS), tl.float32)
    b = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for k in range(0, D, DEPTH):
        x = _block(x_ptr, t, T, k, D, DEPTH)
        a = tl.dot(x, tl.trans(_block(up_ptr, f, F, k, D, DEPTH)), a, input_precision="ieee")
        b = tl.dot(x, tl.trans(_block(up_ptr + F * D, f, F, k, D, DEPTH)), b, input_precision="ieee")
    return a * tl.sigmoid(a) * b


@triton.jit(do_not_specialize=VARYING)
def gates_and_hidden(
    x_ptr, mask_ptr, router_ptr, bias_ptr, each_ptr, gate_up_ptr, shared_ptr, gate_ptr, hidden_ptr, shared_hidden_ptr,
    T, scale,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr, MASK: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROUTER_DEPTH: tl.constexpr,
):  # fmt: skip
    """gate (T, E), unless GIVEN, when the mask is not read; hidden[e, t] = SwiGLU(x[t]) * gate[t, e], of experts with a
    token; shared_hidden[t].

    Grid: any number of programs. SHARED is the width of a shared expert, 0 for none.
    """
    t = tl.arange(0, TOKENS)
    if RULE == GIVEN:
        gate_TE = _read_gates(gate_ptr, T, E, TOKENS, EXPERTS)
    else:
        gate_TE = _make_gates(
            x_ptr, router_ptr, bias_ptr, each_ptr, T, scale,
            E, D, K, RULE, RENORMALIZE, BIAS, EACH, TOKENS, EXPERTS, ROUTER_DEPTH,
        )  # fmt: skip
        kept_T = t < T
        if MASK:
            kept_T = kept_T & (tl.load(mask_ptr + t, mask=t < T, other=0) != 0)
        gate_TE = tl.where(kept_T[:, None], gate_TE, 0.0)
    e = tl.arange(0, EXPERTS)
    if RULE != GIVEN and tl.program_id(0) == 0:
        tl.store(gate_ptr + t[:, None] * E + e[None, :], gate_TE, mask=(t < T)[:, None] & (e < E)[None, :])
    active, place_E = _active(gate_TE)
    width: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    shared_width: tl.constexpr = (SHARED + COLUMNS - 1) // COLUMNS
    for item in range(tl.program_id(0), active * width + shared_width, tl.num_programs(0)):
        if item < active * width:
            expert = tl.sum(tl.where(place_E == item // width, e, 0))
            column = item % width * COLUMNS
            gate_T1 = tl.sum(tl.where(e[None, :] == expert, gate_TE, 0.0), axis=1)[:, None]
            hidden = _hidden(x_ptr, gate_up_ptr, expert, column, T, D, F, TOKENS, COLUMNS, DEPTH)
            hidden = tl.where(gate_T1 != 0, hidden * gate_T1, 0.0)  # NaN of a token stays with its experts
            f = column + tl.arange(0, COLUMNS)
            out_ptrs = hidden_ptr + (tl.cast(expert, tl.int64) * T + t)[:, None] * F + f[None, :]
            tl.store(out_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=(t < T)[:, None] & (f < F)[None, :])
        elif SHARED > 0:
            column = (item - active * width) * COLUMNS
            hidden = _hidden(x_ptr, shared_ptr, 0, column, T, D, SHARED, TOKENS, COLUMNS, DEPTH)
            f = column + tl.arange(0, COLUMNS)
            out_ptrs = shared_hidden_ptr + t[:, None] * SHARED + f[None, :]
            inside = (t < T)[:, None] & (f < SHARED)[None, :]
            tl.store(out_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_down(
    acc, hidden_ptr, down_ptr, expert, row, T, D: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    # acc + hidden[expert] @ down[expert, row]^T
    t = tl.arange(0, TOKENS)
    expert = tl.cast(expert, tl.int64)
    for k in range(0, F, DEPTH):
        hidden = _block(hidden_ptr + expert * T * F, t, T, k, F, DEPTH)
        down = _block(down_ptr + expert * D * F, row, D, k, F, DEPTH)
        acc = tl.dot(hidden, tl.trans(down), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def down_and_sum(
    gate_ptr, hidden_ptr, down_ptr, shared_hidden_ptr, shared_ptr, y_ptr, T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over the experts with a token of hidden[e, t] @ down[e]^T, and the shared expert's.

    Grid: D / COLUMNS, rounded up.
    """
    t, d = tl.arange(0, TOKENS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    active, place_E = _active(_read_gates(gate_ptr, T, E, TOKENS, EXPERTS))
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for i in range(active):
        expert = tl.sum(tl.where(place_E == i, tl.arange(0, EXPERTS), 0))
        acc = _add_down(acc, hidden_ptr, down_ptr, expert, d, T, D, F, TOKENS, DEPTH)
    if SHARED > 0:
        acc = _add_down(acc, shared_hidden_ptr, shared_ptr, 0, d, T, D, SHARED, TOKENS, DEPTH)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y_ptr + t[:, None] * D + d[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)
