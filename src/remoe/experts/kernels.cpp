// Experts for a few tokens, and the steps between matrix products that are called from Python, for float32 and bfloat16.
//
// Rows are split among threads, and every output element is written by one thread in a fixed order, so results do not
// depend on timing.
//
// Legend: T tokens, D model width, F expert width, N pairs, m pairs of one expert, L listed experts.

#include "kernels.h"

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

const int64_t ROWS = 4;  // tokens that share one pass over two rows of weights

// out[0][i] = dot(x_i, v), out[1][i] = dot(x_i, w) for ROWS rows x_i
template <typename X>
inline void dots(const X *v_K, const X *w_K, const X *const *x_iK, int64_t K, float out[2][ROWS]) {
    const X *x0 = x_iK[0], *x1 = x_iK[1], *x2 = x_iK[2], *x3 = x_iK[3];
    float v0 = 0, v1 = 0, v2 = 0, v3 = 0, w0 = 0, w1 = 0, w2 = 0, w3 = 0;
#pragma omp simd reduction(+ : v0, v1, v2, v3, w0, w1, w2, w3)
    for (int64_t k = 0; k < K; k++) {
        float v = load(v_K[k]), w = load(w_K[k]);
        float a = load(x0[k]), b = load(x1[k]), c = load(x2[k]), d = load(x3[k]);
        v0 += v * a, v1 += v * b, v2 += v * c, v3 += v * d;
        w0 += w * a, w1 += w * b, w2 += w * c, w3 += w * d;
    }
    float sums[2][ROWS] = {{v0, v1, v2, v3}, {w0, w1, w2, w3}};
    std::memcpy(out, sums, sizeof(sums));
}

template <typename X>
inline void dots_of_two(const X *v_K, const X *w_K, const X *x0, const X *x1, int64_t K, float out[2][ROWS]) {
    float v0 = 0, v1 = 0, w0 = 0, w1 = 0;
#pragma omp simd reduction(+ : v0, v1, w0, w1)
    for (int64_t k = 0; k < K; k++) {
        float v = load(v_K[k]), w = load(w_K[k]), a = load(x0[k]), b = load(x1[k]);
        v0 += v * a, v1 += v * b, w0 += w * a, w1 += w * b;
    }
    out[0][0] = v0, out[0][1] = v1, out[1][0] = w0, out[1][1] = w1;
}

template <typename X>
inline void dots_of_one(const X *v_K, const X *w_K, const X *x_K, int64_t K, float out[2][ROWS]) {
    float v0 = 0, w0 = 0;
#pragma omp simd reduction(+ : v0, w0)
    for (int64_t k = 0; k < K; k++) {
        float a = load(x_K[k]);
        v0 += load(v_K[k]) * a, w0 += load(w_K[k]) * a;
    }
    out[0][0] = v0, out[1][0] = w0;
}

// The same for `rows` <= ROWS rows that `row_of(i)` finds.
template <typename X, typename RowOf>
inline void dots(const X *v_K, const X *w_K, int64_t rows, RowOf row_of, int64_t K, float out[2][ROWS]) {
    if (rows == 1) return dots_of_one(v_K, w_K, row_of(0), K, out);
    if (rows == 2) return dots_of_two(v_K, w_K, row_of(0), row_of(1), K, out);
    const X *x[ROWS];
    for (int64_t i = 0; i < ROWS; i++) x[i] = row_of(i < rows ? i : 0);
    dots(v_K, w_K, x, K, out);
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
                    int64_t rows = end - pair < ROWS ? end - pair : ROWS;
                    float out[2][ROWS];
                    auto row_of = [&](int64_t i) { return x_TD + token_N[pair + i] * D; };
                    dots(gate_up_2FD + f * D, gate_up_2FD + (F + f) * D, rows, row_of, D, out);
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
                    int64_t rows = end - pair < ROWS ? end - pair : ROWS;
                    float out[2][ROWS];
                    auto row_of = [&](int64_t i) { return hidden_NF + (pair + i) * F; };
                    dots(down_DF + d * F, down_DF + next * F, rows, row_of, F, out);
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
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
