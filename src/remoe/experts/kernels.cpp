// What the loop backend does on a CPU between its matrix products, each in one pass over memory, and experts for a few tokens.
//
// Built at first use by remoe.experts.kernels with whatever C++ compiler is present; plain torch operations take its
// place where there is none. Rows are split among threads, and every output element is written by one thread in a
// fixed order, so results do not depend on timing.
//
// Legend: T tokens, D model width, F expert width, m pairs of one expert, L listed experts.

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float *to, float value) { *to = value; }

inline void store(bfloat16 *to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = nan ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// exp in single precision to 2 units in the last place, in arithmetic that compilers vectorise:
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) by its series to r^7.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);  // NaN passes
    float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

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
    for (int64_t i = 0; i < m; i++) {
        const X *out_D = out_mD + i * D;
        float *y_D = y_TD + token_m[i] * D;
        for (int64_t d = 0; d < D; d++) y_D[d] += load(out_D[d]);
    }
}

// hidden = silu(gate half) * up half * gate of the pair
template <typename X>
void swiglu(const X *pre_m2F, const float *gate_m, int64_t m, int64_t F, X *hidden_mF) {
#pragma omp parallel for schedule(static) if (m * F >= PARALLEL)
    for (int64_t i = 0; i < m; i++) {
        const X *a = pre_m2F + i * 2 * F, *b = a + F;
        X *hidden_F = hidden_mF + i * F;
        float gate = gate_m[i];
        for (int64_t f = 0; f < F; f++) {
            float z = load(a[f]);
            store(hidden_F + f, z * sigmoid(z) * load(b[f]) * gate);
        }
    }
}

// From d loss / d hidden: the hidden activation again, the gradient of the pre-activations and of the gates.
template <typename X>
void swiglu_backward(const X *pre_m2F, const X *dhidden_mF, const float *gate_m, int64_t m, int64_t F, X *hidden_mF,
                     X *dpre_m2F, float *dgate_m) {
#pragma omp parallel for schedule(static) if (m * F >= PARALLEL)
    for (int64_t i = 0; i < m; i++) {
        const X *a = pre_m2F + i * 2 * F, *b = a + F;
        const X *dhidden_F = dhidden_mF + i * F;
        X *hidden_F = hidden_mF + i * F, *da = dpre_m2F + i * 2 * F, *db = da + F;
        float gate = gate_m[i], dgate = 0;
#pragma omp simd reduction(+ : dgate)
        for (int64_t f = 0; f < F; f++) {
            float z = load(a[f]), up = load(b[f]), dhidden = load(dhidden_F[f]);
            float s = sigmoid(z), silu = z * s;
            dgate += dhidden * silu * up;
            store(hidden_F + f, silu * up * gate);
            float scaled = dhidden * gate;
            store(db + f, scaled * silu);
            store(da + f, scaled * up * (s + silu * (1 - s)));
        }
        dgate_m[i] = dgate;
    }
}

const int64_t ROWS = 4;  // rows that share one pass over a weight

// out[i] = dot(x_i, w) for up to ROWS rows x_i
template <typename X>
inline void dots(const X *w_K, const X *const *x_iK, int64_t rows, int64_t K, float *out_i) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const X *x0 = x_iK[0], *x1 = x_iK[rows > 1 ? 1 : 0], *x2 = x_iK[rows > 2 ? 2 : 0], *x3 = x_iK[rows > 3 ? 3 : 0];
    if (rows == 1) {
#pragma omp simd reduction(+ : s0)
        for (int64_t k = 0; k < K; k++) s0 += load(w_K[k]) * load(x0[k]);
    } else if (rows == 2) {
#pragma omp simd reduction(+ : s0, s1)
        for (int64_t k = 0; k < K; k++) {
            float w = load(w_K[k]);
            s0 += w * load(x0[k]);
            s1 += w * load(x1[k]);
        }
    } else {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t k = 0; k < K; k++) {
            float w = load(w_K[k]);
            s0 += w * load(x0[k]);
            s1 += w * load(x1[k]);
            s2 += w * load(x2[k]);
            s3 += w * load(x3[k]);
        }
    }
    float sums[ROWS] = {s0, s1, s2, s3};
    for (int64_t i = 0; i < rows; i++) out_i[i] = sums[i];
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
#pragma omp for schedule(static) nowait
            for (int64_t f = 0; f < F; f++) {
                for (int64_t i = 0; i < count_L[l]; i += ROWS) {
                    int64_t pair = start_L[l] + i, rows = count_L[l] - i < ROWS ? count_L[l] - i : ROWS;
                    const X *x[ROWS];
                    float a[ROWS], b[ROWS];
                    for (int64_t j = 0; j < rows; j++) x[j] = x_TD + token_N[pair + j] * D;
                    dots(gate_up_2FD + f * D, x, rows, D, a);
                    dots(gate_up_2FD + (F + f) * D, x, rows, D, b);
                    for (int64_t j = 0; j < rows; j++)
                        store(hidden_NF + (pair + j) * F + f, a[j] * sigmoid(a[j]) * b[j] * gate_N[pair + j]);
                }
            }
        }
#pragma omp barrier
        for (int64_t l = 0; l < L; l++) {
            const X *down_DF = down_EDF + expert_L[l] * D * F;
            // A thread has the same columns of y for every expert, so that it needs no lock and no fixed turn.
#pragma omp for schedule(static) nowait
            for (int64_t d = 0; d < D; d++) {
                for (int64_t i = 0; i < count_L[l]; i += ROWS) {
                    int64_t pair = start_L[l] + i, rows = count_L[l] - i < ROWS ? count_L[l] - i : ROWS;
                    const X *hidden[ROWS];
                    float sum[ROWS];
                    for (int64_t j = 0; j < rows; j++) hidden[j] = hidden_NF + (pair + j) * F;
                    dots(down_DF + d * F, hidden, rows, F, sum);
                    for (int64_t j = 0; j < rows; j++) y_TD[token_N[pair + j] * D + d] += sum[j];
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
