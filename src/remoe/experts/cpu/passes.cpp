// Forward and backward pass of all experts, one thread per block of an expert's pairs; in float32, and in bfloat16
// where the processor multiplies that (with sums over experts in float32).
//
// A matrix product of a few hundred rows is too small to be shared by threads without loss, but there are many of them.
// So each thread takes a block through gather, up projection, SwiGLU and down projection, in scratch memory of its own.
// Windows of blocks bound the memory for what threads hand to each other: the rows to be summed per token, and what
// the weight gradients are made of. Each sum is done by one thread in the order of the pairs, whatever their number.
//
// Legend: T tokens, D model width, F expert width, E experts, N pairs, C stored pairs, m most pairs of a block, W of
// a window.

#include "adapters.h"
#include "gemm.h"
#include "library.h"
#include "rows.h"

#include <numeric>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

struct Block {
    int64_t expert, start, rows;
};

struct Sizes {
    int64_t T, D, F, E, C, W, m;
    int64_t window_factors, thread_factors;  // rows of memory for `Factors`, shared and of each thread
    int64_t partials;                        // blocks of a window, at most, that have only a part of an expert's pairs
};

// What a call says of the adapters, in this order; the gradients are null in the forward pass.
template <typename X>
struct AdapterArguments {
    const X *gate_up_a_ErD, *gate_up_b_rE2F, *down_a_EqF, *down_b_qED;
    X *dgate_up_a_ErD, *dgate_up_b_rE2F, *ddown_a_EqF, *ddown_b_qED;
    int64_t gate_up_r, down_r;
};

// Of rank 0 where there are none.
template <typename X>
Adapters<X> adapters_of(const AdapterArguments<X> *a, const Sizes &n) {
    if (!a) return {};
    return {{a->gate_up_a_ErD, a->gate_up_b_rE2F, a->dgate_up_a_ErD, a->dgate_up_b_rE2F, a->gate_up_r, n.E, n.D, 2 * n.F},
            {a->down_a_EqF, a->down_b_qED, a->ddown_a_EqF, a->ddown_b_qED, a->down_r, n.E, n.F, n.D}};
}

std::vector<Block> split(const int64_t *count_E, const Sizes &n) {
    std::vector<Block> blocks;
    int64_t start = 0;
    for (int64_t e = 0; e < n.E; e++) {
        int64_t parts = (count_E[e] + n.m - 1) / n.m;
        for (int64_t p = 0; p < parts; p++) {
            int64_t from = count_E[e] * p / parts, to = count_E[e] * (p + 1) / parts;
            blocks.push_back({e, start + from, to - from});
        }
        start += count_E[e];
    }
    return blocks;
}

// End of the window of blocks that begins at `first`: of at most W pairs, and equally many blocks for each thread, which
// otherwise would wait for the one that has a block more.
size_t window_end(const std::vector<Block> &blocks, size_t first, int64_t W) {
    size_t end = first;
    int64_t pairs = 0;
    while (end < blocks.size() && (pairs += blocks[end].rows) <= W) end++;
    const size_t threads = omp_get_max_threads(), count = end - first;
    return end < blocks.size() && count > threads ? end - count % threads : end;
}

// Blocks [first, end), the largest first: whoever is done early takes a small one.
std::vector<size_t> by_size(const std::vector<Block> &blocks, size_t first, size_t end) {
    std::vector<size_t> order(end - first);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return blocks[a].rows > blocks[b].rows; });
    return order;
}

template <typename X>
void gather_rows(const X *x_TD, const int64_t *token_m, int64_t m, int64_t D, X *out_mD) {
    for (int64_t i = 0; i < m; i++) std::memcpy(out_mD + i * D, x_TD + token_m[i] * D, D * sizeof(X));
}

// y_TD[token] += row for the rows of blocks [first, end). Each thread has a range of tokens; an expert's tokens are
// sorted, so the thread's rows are one slice of each block.
void combine(const std::vector<Block> &blocks, size_t first, size_t end, const float *out_WD, const int64_t *token_N,
             const Sizes &n, float *y_TD) {
#pragma omp parallel
    {
        int64_t from = n.T * omp_get_thread_num() / omp_get_num_threads();
        int64_t to = n.T * (omp_get_thread_num() + 1) / omp_get_num_threads();
        for (size_t b = first; b < end; b++) {
            const int64_t *token = token_N + blocks[b].start, *last = token + blocks[b].rows;
            const float *out_mD = out_WD + (blocks[b].start - blocks[first].start) * n.D;
            for (const int64_t *t = std::lower_bound(token, last, from); t < last && *t < to; t++)
                add_row(out_mD + (t - token) * n.D, n.D, y_TD + *t * n.D);
        }
    }
}

// What the weight gradients are made of.
template <typename X>
struct Factors {
    X *x_D, *dy_D, *hidden_F, *dpre_2F;

    Factors row(int64_t i, const Sizes &n) const {
        return {x_D + i * n.D, dy_D + i * n.D, hidden_F + i * n.F, dpre_2F + i * 2 * n.F};
    }

    static Factors in(X *memory, int64_t rows, const Sizes &n) {
        return {memory, memory + rows * n.D, memory + rows * 2 * n.D, memory + rows * (2 * n.D + n.F)};
    }

    static int64_t numbers(int64_t rows, const Sizes &n) { return rows * (2 * n.D + 3 * n.F); }
};

// Rows [from, to) of one expert's weight gradient, over its pairs [start, start + rows).
struct Tile {
    bool down;
    int64_t expert, start, rows, from, to;
    bool first;  // of the expert's windows
};

template <typename X>
void weight_gradient(const Tile &t, const Factors<X> &a, const Sizes &n, X *dgate_up_E2FD, X *ddown_EDF) {
    const int64_t size = t.to - t.from;
    const bool add = !t.first;
    if (t.down)
        product(true, false, size, n.F, t.rows, a.dy_D + t.from, n.D, a.hidden_F, n.F, add,
                ddown_EDF + (t.expert * n.D + t.from) * n.F, n.F);
    else
        product(true, false, size, n.D, t.rows, a.dpre_2F + t.from, 2 * n.F, a.x_D, n.D, add,
                dgate_up_E2FD + (t.expert * 2 * n.F + t.from) * n.D, n.D);
}

bool is_whole(const Block &block, const int64_t *count_E) { return block.rows == count_E[block.expert]; }

// Tiles for the experts of a window that have several blocks.
std::vector<Tile> weight_tiles(const std::vector<Block> &blocks, size_t first, size_t end, const int64_t *count_E,
                               const Sizes &n) {
    std::vector<Tile> tiles;
    const int64_t parts = omp_get_max_threads();
    for (size_t b = first; b < end;) {
        if (is_whole(blocks[b], count_E)) {
            b++;
            continue;
        }
        const int64_t e = blocks[b].expert, start = blocks[b].start;
        const bool fresh = b == 0 || blocks[b - 1].expert != e;
        int64_t rows = 0;
        for (; b < end && blocks[b].expert == e; b++) rows += blocks[b].rows;
        for (int64_t p = 0; p < parts; p++) {
            tiles.push_back({false, e, start, rows, 2 * n.F * p / parts, 2 * n.F * (p + 1) / parts, fresh});
            tiles.push_back({true, e, start, rows, n.D * p / parts, n.D * (p + 1) / parts, fresh});
        }
    }
    return tiles;
}

// Scratch memory: rows to be summed over experts, in float32, and behind them the numbers of windows and threads.
template <typename X>
int64_t scratch_bytes(int64_t numbers, const Sizes &n) {
    return n.W * n.D * sizeof(float) + numbers * sizeof(X);
}

template <typename X>
int64_t forward_scratch(const Sizes &n, const Adapters<X> &adapters) {
    return scratch_bytes<X>(omp_get_max_threads() * n.m * (n.D + 3 * n.F + adapters.rank()), n);
}

// Numbers of a thread: its factors, two rows of activations, and products with the adapters' factors.
template <typename X>
int64_t backward_thread(const Sizes &n, const Adapters<X> &adapters) {
    return Factors<X>::numbers(n.thread_factors, n) + n.m * (3 * n.F + 2 * adapters.rank());
}

template <typename X>
int64_t backward_scratch(const Sizes &n, const Adapters<X> &adapters) {
    const int64_t of_threads = omp_get_max_threads() * backward_thread(n, adapters);
    return n.partials * adapters.numbers() * sizeof(float) +
           scratch_bytes<X>(Factors<X>::numbers(n.window_factors, n) + of_threads, n);
}

template <typename X>
void forward(const X *x_TD, const X *gate_up_E2FD, const X *down_EDF, const float *gate_N, const int64_t *token_N,
             const int64_t *count_E, const Sizes &n, const Adapters<X> &adapters, void *scratch, X *pre_C2F,
             float *y_TD) {
    const int64_t D = n.D, F = n.F, m = n.m;
    const std::vector<Block> blocks = split(count_E, n);
    float *out_WD = (float *)scratch;
    X *of_threads = (X *)(out_WD + n.W * D);
    for (size_t first = 0, end; first < blocks.size(); first = end) {
        end = window_end(blocks, first, n.W);
        const std::vector<size_t> order = by_size(blocks, first, end);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t i = 0; i < order.size(); i++) {
            const auto [e, start, rows] = blocks[order[i]];
            X *x_mD = of_threads + omp_get_thread_num() * m * (D + 3 * F + adapters.rank());
            X *hidden_mF = x_mD + m * D, *again_m2F = hidden_mF + m * F, *t_mr = again_m2F + m * 2 * F;
            X *pre_m2F = start + rows <= n.C ? pre_C2F + start * 2 * F : again_m2F;
            gather_rows(x_TD, token_N + start, rows, D, x_mD);
            product(false, true, rows, 2 * F, D, x_mD, D, gate_up_E2FD + e * 2 * F * D, D, false, pre_m2F, 2 * F);
            adapters.gate_up.add(e, rows, x_mD, t_mr, pre_m2F);
            for (int64_t j = 0; j < rows; j++)
                swiglu_row(pre_m2F + j * 2 * F, gate_N[start + j], F, hidden_mF + j * F);
            // Of a block that reaches beyond C its first rows: with other threads the backward pass has other blocks.
            if (start < n.C && start + rows > n.C)
                std::memcpy(pre_C2F + start * 2 * F, pre_m2F, (n.C - start) * 2 * F * sizeof(X));
            float *out_mD = out_WD + (start - blocks[first].start) * D;
            product(false, true, rows, D, F, hidden_mF, F, down_EDF + e * D * F, F, false, out_mD, D);
            adapters.down.add(e, rows, hidden_mF, t_mr, out_mD);
        }
        combine(blocks, first, end, out_WD, token_N, n, y_TD);
    }
}

// For each block of a window the number of those before it that have only a part of their expert's pairs.
std::vector<int64_t> partial_numbers(const std::vector<Block> &blocks, size_t first, size_t end,
                                     const int64_t *count_E) {
    std::vector<int64_t> numbers;
    for (size_t b = first, before = 0; b < end; b++) {
        numbers.push_back(before);
        before += !is_whole(blocks[b], count_E);
    }
    return numbers;
}

// Of the block's pairs: into the expert's place, or where these are only a part of its pairs into `partial`.
template <typename X>
void adapter_gradients(const LowRank<X> &adapter, int64_t e, int64_t rows, const X *in_mI, const X *dout_mO,
                       const X *u_mr, X *t_mr, float *partial) {
    if (partial)
        adapter.gradients(e, rows, in_mI, dout_mO, u_mr, t_mr, partial, partial + adapter.r * adapter.I, adapter.O);
    else
        adapter.gradients(e, rows, in_mI, dout_mO, u_mr, t_mr, adapter.da(e), adapter.db(e), adapter.E * adapter.O);
}

// Sums the adapters' gradients of the blocks of a window that have only a part of their expert's pairs, in order.
template <typename X>
void add_partials(const std::vector<Block> &blocks, size_t first, size_t end, const int64_t *count_E,
                  const Adapters<X> &adapters, float *partials) {
    const int64_t size = adapters.numbers();
    float *next = partials;
    for (size_t b = first; b < end;) {
        if (is_whole(blocks[b], count_E)) {
            b++;
            continue;
        }
        const int64_t e = blocks[b].expert;
        const bool fresh = b == 0 || blocks[b - 1].expert != e;
        float *sum = next;
        next += size;
        for (b++; b < end && blocks[b].expert == e; b++, next += size) {
#pragma omp parallel for simd schedule(static)
            for (int64_t i = 0; i < size; i++) sum[i] += next[i];
        }
        adapters.gate_up.put_gradients(e, !fresh, sum);
        adapters.down.put_gradients(e, !fresh, sum + adapters.gate_up.numbers());
    }
}

// Without gradients of the weights where there is no room for them.
template <typename X>
void backward(const X *dy_TD, const X *x_TD, const X *gate_up_E2FD, const X *down_EDF, const float *gate_N,
              const int64_t *token_N, const int64_t *count_E, const X *pre_C2F, const Sizes &n,
              const Adapters<X> &adapters, void *scratch, float *dx_TD, X *dgate_up_E2FD, X *ddown_EDF,
              float *dgate_N) {
    const int64_t D = n.D, F = n.F, m = n.m;
    const std::vector<Block> blocks = split(count_E, n);
    const int64_t of_thread = backward_thread(n, adapters);
    float *dx_WD = (float *)scratch, *partials = dx_WD + n.W * D;
    X *of_window = (X *)(partials + n.partials * adapters.numbers());
    X *of_threads = of_window + Factors<X>::numbers(n.window_factors, n);
    const Factors<X> window = Factors<X>::in(of_window, n.window_factors, n);
    const bool weights = dgate_up_E2FD && ddown_EDF;
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < n.E; e++) {
        if (count_E[e]) continue;
        adapters.gate_up.clear_gradients(e);
        adapters.down.clear_gradients(e);
        if (!weights) continue;
        std::memset(dgate_up_E2FD + e * 2 * F * D, 0, 2 * F * D * sizeof(X));
        std::memset(ddown_EDF + e * D * F, 0, D * F * sizeof(X));
    }
    for (size_t first = 0, end; first < blocks.size(); first = end) {
        end = window_end(blocks, first, n.W);
        const int64_t base = blocks[first].start;
        const std::vector<size_t> order = by_size(blocks, first, end);
        const std::vector<int64_t> partial = partial_numbers(blocks, first, end, count_E);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t i = 0; i < order.size(); i++) {
            const auto [e, start, rows] = blocks[order[i]];
            const X *gate_up_2FD = gate_up_E2FD + e * 2 * F * D, *pre_m2F = pre_C2F + start * 2 * F;
            X *own = of_threads + omp_get_thread_num() * of_thread;
            X *dhidden_mF = own + Factors<X>::numbers(n.thread_factors, n), *again_m2F = dhidden_mF + m * F;
            X *t_mr = again_m2F + m * 2 * F, *u_mr = t_mr + m * adapters.rank();
            // All of an expert's pairs in one block: its weight gradients are made while the factors are in cache.
            const bool whole = is_whole(blocks[order[i]], count_E);
            const Factors<X> a = whole || !weights ? Factors<X>::in(own, n.thread_factors, n) : window.row(start - base, n);
            gather_rows(x_TD, token_N + start, rows, D, a.x_D);
            gather_rows(dy_TD, token_N + start, rows, D, a.dy_D);
            if (start + rows > n.C) {
                product(false, true, rows, 2 * F, D, a.x_D, D, gate_up_2FD, D, false, again_m2F, 2 * F);
                adapters.gate_up.add(e, rows, a.x_D, t_mr, again_m2F);
                pre_m2F = again_m2F;
            }
            product(false, false, rows, F, D, a.dy_D, D, down_EDF + e * D * F, F, false, dhidden_mF, F);
            adapters.down.add_transposed(e, rows, a.dy_D, u_mr, dhidden_mF);
            for (int64_t j = 0; j < rows; j++) {
                const Factors<X> row = a.row(j, n);
                dgate_N[start + j] = swiglu_backward_row(pre_m2F + j * 2 * F, dhidden_mF + j * F, gate_N[start + j], F,
                                                         row.hidden_F, row.dpre_2F);
            }
            float *dx_mD = dx_WD + (start - base) * D;
            product(false, false, rows, D, 2 * F, a.dpre_2F, 2 * F, gate_up_2FD, D, false, dx_mD, D);
            float *sums = whole ? nullptr : partials + partial[order[i] - first] * adapters.numbers();
            adapter_gradients(adapters.down, e, rows, a.hidden_F, a.dy_D, u_mr, t_mr,
                              sums ? sums + adapters.gate_up.numbers() : nullptr);
            adapters.gate_up.add_transposed(e, rows, a.dpre_2F, u_mr, dx_mD);
            adapter_gradients(adapters.gate_up, e, rows, a.x_D, a.dpre_2F, u_mr, t_mr, sums);
            if (whole && weights) {
                weight_gradient({false, e, start, rows, 0, 2 * F, true}, a, n, dgate_up_E2FD, ddown_EDF);
                weight_gradient({true, e, start, rows, 0, D, true}, a, n, dgate_up_E2FD, ddown_EDF);
            }
        }
        combine(blocks, first, end, dx_WD, token_N, n, dx_TD);
        if (adapters.rank()) add_partials(blocks, first, end, count_E, adapters, partials);
        if (!weights) continue;
        const std::vector<Tile> tiles = weight_tiles(blocks, first, end, count_E, n);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t i = 0; i < tiles.size(); i++)
            weight_gradient(tiles[i], window.row(tiles[i].start - base, n), n, dgate_up_E2FD, ddown_EDF);
    }
}

}  // namespace

#define EXPORT(X, suffix)                                                                                              \
    extern "C" int64_t forward_scratch_##suffix(const Sizes *n, const AdapterArguments<X> *adapters) {                 \
        return forward_scratch<X>(*n, adapters_of(adapters, *n));                                                      \
    }                                                                                                                  \
    extern "C" int64_t backward_scratch_##suffix(const Sizes *n, const AdapterArguments<X> *adapters) {                \
        return backward_scratch<X>(*n, adapters_of(adapters, *n));                                                     \
    }                                                                                                                  \
    extern "C" void experts_forward_##suffix(const X *x, const X *gate_up, const X *down, const float *gate,           \
                                             const int64_t *token, const int64_t *count, const Sizes *n,               \
                                             const AdapterArguments<X> *adapters, void *scratch, X *pre, float *y) {   \
        forward(x, gate_up, down, gate, token, count, *n, adapters_of(adapters, *n), scratch, pre, y);                 \
    }                                                                                                                  \
    extern "C" void experts_backward_##suffix(const X *dy, const X *x, const X *gate_up, const X *down,                \
                                              const float *gate, const int64_t *token, const int64_t *count,           \
                                              const X *pre, const Sizes *n, const AdapterArguments<X> *adapters,       \
                                              void *scratch, float *dx, X *dgate_up, X *ddown, float *dgate) {         \
        backward(dy, x, gate_up, down, gate, token, count, pre, *n, adapters_of(adapters, *n), scratch, dx, dgate_up,  \
                 ddown, dgate);                                                                                        \
    }

// Addresses of the library's products; null where ours are taken.
extern "C" void use_library_float32(void *gemm) { library_gemm<float> = (Gemm<float>)gemm; }
extern "C" void use_library_bfloat16(void *gemm) { library_gemm<bfloat16> = (Gemm<bfloat16>)gemm; }

// Nanoseconds that all threads together have spent in matrix products since the last call; `on` times further ones.
extern "C" int64_t time_products(bool on) {
    products_timed = on;
    return product_nanoseconds.exchange(0);
}

EXPORT(float, float32)
#if defined(__AVX512BF16__)
EXPORT(bfloat16, bfloat16)
#endif
