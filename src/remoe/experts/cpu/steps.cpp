// Experts for a few tokens, and the steps between matrix products that are called from Python, in float32 and bfloat16.
//
// Rows are split among threads, and every output element is written by one thread in a fixed order, so results do not
// depend on timing.
//
// Legend: T tokens, D model width, F expert width, N pairs, m pairs of one expert, L listed experts.

#include "gemm.h"
#include "rows.h"

namespace {

// Fewer elements than this are not worth waking the other threads for.
const int64_t PARALLEL = 16384;

template <typename X>
void gather(const X *x_TD, const int64_t *token_m, int64_t m, int64_t D, X *out_mD) {
#pragma omp parallel for schedule(static) if (m * D >= PARALLEL)
    for (int64_t i = 0; i < m; i++) std::memcpy(out_mD + i * D, x_TD + token_m[i] * D, D * sizeof(X));
}

// y_TD[token] += out; a token is at most once in token_m.
template <typename X>
void scatter_add(const X *out_mD, const int64_t *token_m, int64_t m, int64_t D, float *y_TD) {
#pragma omp parallel for schedule(static) if (m * D >= PARALLEL)
    for (int64_t i = 0; i < m; i++) add_row(out_mD + i * D, D, y_TD + token_m[i] * D);
}

template <typename X>
void swiglu(const X *pre_m2F, const float *gate_m, int64_t m, int64_t F, X *hidden_mF) {
#pragma omp parallel for schedule(static) if (m * F >= PARALLEL)
    for (int64_t i = 0; i < m; i++) swiglu_row(pre_m2F + i * 2 * F, gate_m[i], F, hidden_mF + i * F);
}

template <typename X>
void swiglu_backward(const X *pre_m2F, const X *dhidden_mF, const float *gate_m, int64_t m, int64_t F, X *hidden_mF,
                     X *dpre_m2F, float *dgate_m) {
#pragma omp parallel for schedule(static) if (m * F >= PARALLEL)
    for (int64_t i = 0; i < m; i++)
        dgate_m[i] = swiglu_backward_row(pre_m2F + i * 2 * F, dhidden_mF + i * F, gate_m[i], F, hidden_mF + i * F,
                                         dpre_m2F + i * 2 * F);
}

typedef uint16_t bits16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits32 __attribute__((vector_size(4 * LANES), may_alias));

inline vec load_vec(const float *p) { return *(const vec *)p; }
inline vec load_vec(const bfloat16 *p) { return (vec)(__builtin_convertvector(*(const bits16 *)p, bits32) << 16); }

inline float sum_of(vec v) {
    float lanes[LANES], sum = 0;
    std::memcpy(lanes, &v, sizeof(lanes));
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

const int ROWS = 8;  // tokens that share one pass over two rows of weights

// out[0][i] = dot(x_i, v), out[1][i] = dot(x_i, w) for R rows x_i. The next rows of weights, `step` elements on, are
// fetched meanwhile: processors fetch ahead by themselves, but not beyond a page of 4 KB.
template <int R, typename X>
inline void dots_of(const X *v_K, const X *w_K, int64_t step, const X *const *x_iK, int64_t K, float out[2][ROWS]) {
    vec v_sum[R] = {}, w_sum[R] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        __builtin_prefetch(v_K + step + k, 0, 2);
        __builtin_prefetch(w_K + step + k, 0, 2);
        const vec v = load_vec(v_K + k), w = load_vec(w_K + k);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const vec x = load_vec(x_iK[i] + k);
            v_sum[i] += v * x, w_sum[i] += w * x;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
        float v = sum_of(v_sum[i]), w = sum_of(w_sum[i]);
        for (int64_t j = k; j < K; j++) {
            const float x = load(x_iK[i][j]);
            v += load(v_K[j]) * x, w += load(w_K[j]) * x;
        }
        out[0][i] = v, out[1][i] = w;
    }
}

// The same for `rows` <= R of them.
template <int R = ROWS, typename X>
inline void dots(const X *v_K, const X *w_K, int64_t step, const X *const *x_iK, int64_t rows, int64_t K,
                 float out[2][ROWS]) {
    if constexpr (R > 1)
        if (rows < R) return dots<R - 1>(v_K, w_K, step, x_iK, rows, K, out);
    dots_of<R>(v_K, w_K, step, x_iK, K, out);
}

// Few tokens: time goes into reading the weights of the active experts, so each is read once, in order, by one thread.
template <typename X>
void few_tokens(const X *x_TD, const X *gate_up_E2FD, const X *down_EDF, const float *gate_N, const int64_t *token_N,
                const int64_t *expert_L, const int64_t *start_L, const int64_t *count_L, int64_t L, int64_t D,
                int64_t F, X *hidden_NF, float *y_TD) {
#pragma omp parallel
    {
        for (int64_t l = 0; l < L; l++) {
            const X *gate_up_2FD = gate_up_E2FD + expert_L[l] * 2 * F * D;
            const int64_t end = start_L[l] + count_L[l];
#pragma omp for schedule(static) nowait
            for (int64_t f = 0; f < F; f++) {
                for (int64_t pair = start_L[l]; pair < end; pair += ROWS) {
                    const int64_t rows = std::min<int64_t>(end - pair, ROWS);
                    const X *x[ROWS];
                    for (int64_t i = 0; i < rows; i++) x[i] = x_TD + token_N[pair + i] * D;
                    float out[2][ROWS];
                    dots(gate_up_2FD + f * D, gate_up_2FD + (F + f) * D, D, x, rows, D, out);
                    for (int64_t i = 0; i < rows; i++) {
                        float z = out[0][i];
                        store(hidden_NF + (pair + i) * F + f, z * sigmoid(z) * out[1][i] * gate_N[pair + i]);
                    }
                }
            }
        }
#pragma omp barrier
        for (int64_t l = 0; l < L; l++) {
            const X *down_DF = down_EDF + expert_L[l] * D * F;
            const int64_t end = start_L[l] + count_L[l];
            // A thread has the same columns of y for every expert, so that it needs no lock and no fixed turn.
#pragma omp for schedule(static) nowait
            for (int64_t half = 0; half < (D + 1) / 2; half++) {
                const int64_t d = 2 * half, next = d + 1 < D ? d + 1 : d;
                for (int64_t pair = start_L[l]; pair < end; pair += ROWS) {
                    const int64_t rows = std::min<int64_t>(end - pair, ROWS);
                    const X *hidden[ROWS];
                    for (int64_t i = 0; i < rows; i++) hidden[i] = hidden_NF + (pair + i) * F;
                    float out[2][ROWS];
                    dots(down_DF + d * F, down_DF + next * F, 2 * F, hidden, rows, F, out);
                    for (int64_t i = 0; i < rows; i++) {
                        float *y_D = y_TD + token_N[pair + i] * D;
                        y_D[d] += out[0][i];
                        if (next > d) y_D[next] += out[1][i];
                    }
                }
            }
        }
    }
}

// The same by the gates of all experts, (T, E), where zero means no pair. False, with nothing done, where the active
// experts have more than `most` pairs each, on average: matrix products are faster then.
template <typename X>
bool few_tokens_by_gates(const X *x_TD, const float *gate_TE, const X *gate_up_E2FD, const X *down_EDF, int64_t T,
                         int64_t D, int64_t F, int64_t E, int64_t most, float *y_TD) {
    static thread_local std::vector<float> gate_N;
    static thread_local std::vector<int64_t> token_N, expert_L, start_L, count_L;
    static thread_local std::vector<X> hidden_NF;
    gate_N.clear(), token_N.clear(), expert_L.clear(), start_L.clear(), count_L.clear();
    for (int64_t e = 0; e < E; e++) {
        const int64_t start = int64_t(token_N.size());
        for (int64_t t = 0; t < T; t++)
            if (const float gate = gate_TE[t * E + e]; gate != 0) token_N.push_back(t), gate_N.push_back(gate);
        const int64_t count = int64_t(token_N.size()) - start;
        if (count) expert_L.push_back(e), start_L.push_back(start), count_L.push_back(count);
    }
    const int64_t N = int64_t(token_N.size()), L = int64_t(expert_L.size());
    if (N > most * L) return false;
    hidden_NF.resize(N * F);
    few_tokens(x_TD, gate_up_E2FD, down_EDF, gate_N.data(), token_N.data(), expert_L.data(), start_L.data(),
               count_L.data(), L, D, F, hidden_NF.data(), y_TD);
    return true;
}

}  // namespace

#define EXPORT(X, suffix)                                                                                             \
    extern "C" void gather_##suffix(const X *x, const int64_t *token, int64_t m, int64_t D, X *out) {                 \
        gather(x, token, m, D, out);                                                                                  \
    }                                                                                                                 \
    extern "C" void scatter_add_##suffix(const X *out, const int64_t *token, int64_t m, int64_t D, float *y) {        \
        scatter_add(out, token, m, D, y);                                                                             \
    }                                                                                                                 \
    extern "C" void swiglu_##suffix(const X *pre, const float *gate, int64_t m, int64_t F, X *hidden) {               \
        swiglu(pre, gate, m, F, hidden);                                                                              \
    }                                                                                                                 \
    extern "C" void swiglu_backward_##suffix(const X *pre, const X *dhidden, const float *gate, int64_t m, int64_t F, \
                                             X *hidden, X *dpre, float *dgate) {                                      \
        swiglu_backward(pre, dhidden, gate, m, F, hidden, dpre, dgate);                                               \
    }                                                                                                                 \
    extern "C" void few_tokens_##suffix(const X *x, const X *gate_up, const X *down, const float *gate,               \
                                        const int64_t *token, const int64_t *expert, const int64_t *start,            \
                                        const int64_t *count, int64_t L, int64_t D, int64_t F, X *hidden, float *y) { \
        few_tokens(x, gate_up, down, gate, token, expert, start, count, L, D, F, hidden, y);                          \
    }                                                                                                                 \
    extern "C" bool few_tokens_by_gates_##suffix(const X *x, const float *gate, const X *gate_up, const X *down,      \
                                                 int64_t T, int64_t D, int64_t F, int64_t E, int64_t most, float *y) {\
        return few_tokens_by_gates(x, gate, gate_up, down, T, D, F, E, most, y);                                      \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
