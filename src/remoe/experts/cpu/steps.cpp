// Experts for a few tokens, and the steps between matrix products that are called from Python, in float32 and bfloat16.
//
// Rows are split among threads, and every output element is written by one thread in a fixed order, so results do not
// depend on timing.
//
// Legend: T tokens, D model width, F expert width, N pairs, m pairs of one expert, L listed experts.

#include "dots.h"

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

// Few tokens: time goes into reading the weights of the active experts, so each is read once, in order, by one thread.
// The weights are matrices of E 2F and of E D rows.
template <typename M, typename X>
void few_tokens(const X *x_TD, const M &gate_up, const M &down, const float *gate_N, const int64_t *token_N,
                const int64_t *expert_L, const int64_t *start_L, const int64_t *count_L, int64_t L, int64_t D,
                int64_t F, X *hidden_NF, float *y_TD) {
#pragma omp parallel
    {
        for (int64_t l = 0; l < L; l++) {
            const M gate_up_2FD = gate_up.from(expert_L[l] * 2 * F);
            const int64_t end = start_L[l] + count_L[l];
#pragma omp for schedule(static) nowait
            for (int64_t f = 0; f < F; f++) {
                for (int64_t pair = start_L[l]; pair < end; pair += ROWS) {
                    const int64_t rows = std::min<int64_t>(end - pair, ROWS);
                    const X *x[ROWS];
                    for (int64_t i = 0; i < rows; i++) x[i] = x_TD + token_N[pair + i] * D;
                    float out[2][ROWS];
                    dots(gate_up_2FD, f, F + f, 1, x, rows, out);
                    for (int64_t i = 0; i < rows; i++) {
                        float z = out[0][i];
                        store(hidden_NF + (pair + i) * F + f, z * sigmoid(z) * out[1][i] * gate_N[pair + i]);
                    }
                }
            }
        }
#pragma omp barrier
        for (int64_t l = 0; l < L; l++) {
            const M down_DF = down.from(expert_L[l] * D);
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
                    dots(down_DF, d, next, 2, hidden, rows, out);
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
template <typename M, typename X>
bool few_tokens_by_gates(const X *x_TD, const float *gate_TE, const M &gate_up, const M &down, int64_t T, int64_t D,
                         int64_t F, int64_t E, int64_t most, float *y_TD) {
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
    few_tokens(x_TD, gate_up, down, gate_N.data(), token_N.data(), expert_L.data(), start_L.data(), count_L.data(), L,
               D, F, hidden_NF.data(), y_TD);
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
        const Plain<X> in{gate_up, D}, out{down, F};                                                                  \
        few_tokens(x, in, out, gate, token, expert, start, count, L, D, F, hidden, y);                                \
    }                                                                                                                 \
    extern "C" bool few_tokens_by_gates_##suffix(const X *x, const float *gate, const X *gate_up, const X *down,      \
                                                 int64_t T, int64_t D, int64_t F, int64_t E, int64_t most, float *y) {\
        const Plain<X> in{gate_up, D}, out{down, F};                                                                  \
        return few_tokens_by_gates(x, gate, in, out, T, D, F, E, most, y);                                            \
    }                                                                                                                 \
    extern "C" bool scaled_by_gates_##suffix(const X *x, const float *gate, const int8_t *gate_up,                    \
                                             const float *gate_up_scale, const int8_t *down, const float *down_scale, \
                                             int64_t T, int64_t D, int64_t F, int64_t E, int64_t most, float *y) {    \
        const Scaled in{gate_up, gate_up_scale, D}, out{down, down_scale, F};                                         \
        return few_tokens_by_gates(x, gate, in, out, T, D, F, E, most, y);                                            \
    }                                                                                                                 \
    extern "C" bool packed_by_gates_##suffix(const X *x, const float *gate, const uint8_t *gate_up,                   \
                                             const uint8_t *down, int64_t T, int64_t D, int64_t F, int64_t E,         \
                                             int64_t most, float *y) {                                                \
        const Packed in{gate_up, D}, out{down, F};                                                                    \
        return few_tokens_by_gates(x, gate, in, out, T, D, F, E, most, y);                                            \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
