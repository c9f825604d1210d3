// Steps of a language model that go row by row and are no matrix products, with their gradients: RMSNorm, rotary
// position embedding, and the cross-entropy of logits. Each row stays in cache until it is done.
//
// Rows are split among threads, and every sum is made in an order that does not depend on the number of threads.
//
// Legend: T tokens, D model width, H heads of queries, G heads of keys, d width of a head, P positions, t tokens of one
// chunk, V vocabulary, s sums.

#include "rows.h"

#include <algorithm>
#include <cmath>

namespace {

const int64_t PARALLEL = 16384;   // fewer elements than this are not worth waking the other threads for
const int64_t ROWS_OF_A_SUM = 64;  // rows whose weight gradients one thread adds up

// y is the norm of x; with `added`, of the sum of both, which is written too.
template <typename X>
void rms_norm(const X *x_TD, const X *added_TD, const X *weight_D, int64_t T, int64_t D, float eps, X *sum_TD, X *y_TD,
              float *scale_T) {
#pragma omp parallel for schedule(static) if (T * D >= PARALLEL)
    for (int64_t t = 0; t < T; t++) {
        const X *x = x_TD + t * D;
        X *y = y_TD + t * D;
        if (added_TD) {
            const X *added = added_TD + t * D;
            X *sum = sum_TD + t * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) store(sum + d, load(x[d]) + load(added[d]));
            x = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) squares += load(x[d]) * load(x[d]);
        const float scale = 1 / std::sqrt(squares / D + eps);
        scale_T[t] = scale;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) {
            X normed;  // 16-bit models round before they multiply by the weight
            store(&normed, load(x[d]) * scale);
            store(y + d, load(weight_D[d]) * load(normed));
        }
    }
}

// dx, and for each ROWS_OF_A_SUM rows the sum of their weight gradients. `other`, unless null, is added to dx: the
// gradient that x has from elsewhere.
template <typename X>
void rms_norm_backward(const X *dy_TD, const X *x_TD, const X *weight_D, const float *scale_T, const X *other_TD,
                       int64_t T, int64_t D, X *dx_TD, float *dweight_sD) {
    const int64_t sums = (T + ROWS_OF_A_SUM - 1) / ROWS_OF_A_SUM;
#pragma omp parallel for schedule(static) if (T * D >= PARALLEL)
    for (int64_t s = 0; s < sums; s++) {
        float *dweight = dweight_sD + s * D;
        std::fill(dweight, dweight + D, 0.0f);
        for (int64_t t = s * ROWS_OF_A_SUM; t < std::min(T, (s + 1) * ROWS_OF_A_SUM); t++) {
            const X *dy = dy_TD + t * D, *x = x_TD + t * D, *other = other_TD ? other_TD + t * D : nullptr;
            X *dx = dx_TD + t * D;
            const float scale = scale_T[t];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) dot += load(dy[d]) * load(weight_D[d]) * load(x[d]);
            const float along = dot * scale * scale / D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) {
                dweight[d] += load(dy[d]) * load(x[d]) * scale;
                const float gradient = (load(dy[d]) * load(weight_D[d]) - load(x[d]) * along) * scale;
                store(dx + d, other ? load(other[d]) + gradient : gradient);
            }
        }
    }
}

// `back`: the transposed map, for gradients.
template <typename X>
inline void rotate_heads(const X *from_Hd, const X *cos_d, const X *sin_d, int64_t H, int64_t d, bool back, X *to_Hd) {
    const int64_t half = d / 2;
    const float sign = back ? -1 : 1;
    const X *sin_of_first = back ? sin_d + half : sin_d, *sin_of_second = back ? sin_d : sin_d + half;
    for (int64_t h = 0; h < H; h++, from_Hd += d, to_Hd += d) {
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            const float first = load(from_Hd[i]), second = load(from_Hd[half + i]);
            store(to_Hd + i, first * load(cos_d[i]) - sign * second * load(sin_of_first[i]));
            store(to_Hd + half + i, second * load(cos_d[half + i]) + sign * first * load(sin_of_second[i]));
        }
    }
}

// Heads of queries, keys and values: addresses of the first token's, and distances between tokens.
template <typename X>
struct Heads {
    X *q, *k, *v;  // v null: none
    int64_t q_row, k_row, v_row;
};

// Queries and keys of each token by the row of its position: row t of P, which come again for each sequence of a batch.
// Values are copied.
template <typename X>
void rotate(const Heads<X> &from, const X *cos_Pd, const X *sin_Pd, const Heads<X> &to, int64_t T, int64_t P, int64_t H,
            int64_t G, int64_t d, bool back) {
#pragma omp parallel for schedule(static) if (T * (H + G) * d >= PARALLEL)
    for (int64_t t = 0; t < T; t++) {
        const X *cos_d = cos_Pd + t % P * d, *sin_d = sin_Pd + t % P * d;
        rotate_heads(from.q + t * from.q_row, cos_d, sin_d, H, d, back, to.q + t * to.q_row);
        rotate_heads(from.k + t * from.k_row, cos_d, sin_d, G, d, back, to.k + t * to.k_row);
        if (from.v) std::memcpy(to.v + t * to.v_row, from.v + t * from.v_row, G * d * sizeof(X));
    }
}

// Logits become the gradients of the cross-entropy, softmax - onehot(target). False where a target is no column; the
// results are then undefined.
bool cross_entropy(float *logits_tV, const int64_t *target_t, int64_t t, int64_t V, float *nats_t) {
    bool valid = true;
#pragma omp parallel for schedule(static) reduction(&& : valid) if (t * V >= PARALLEL)
    for (int64_t i = 0; i < t; i++) {
        float *row = logits_tV + i * V, largest = row[0], sum = 0;
        const int64_t target = target_t[i];
        if (target < 0 || target >= V) {
            valid = false;
            continue;
        }
#pragma omp simd reduction(max : largest)
        for (int64_t v = 0; v < V; v++) largest = row[v] > largest ? row[v] : largest;
        const float above = largest - row[target];
#pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < V; v++) {
            row[v] = exponential(row[v] - largest);
            sum += row[v];
        }
        nats_t[i] = std::log(sum) + above;
        const float share = 1 / sum;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) row[v] *= share;
        row[target] -= 1;
    }
    return valid;
}

}  // namespace

#define EXPORT(X, suffix)                                                                                             \
    extern "C" void rms_norm_##suffix(const X *x, const X *added, const X *weight, int64_t T, int64_t D, float eps,   \
                                      X *sum, X *y, float *scale) {                                                   \
        rms_norm(x, added, weight, T, D, eps, sum, y, scale);                                                         \
    }                                                                                                                 \
    extern "C" void rms_norm_backward_##suffix(const X *dy, const X *x, const X *weight, const float *scale,          \
                                               const X *other, int64_t T, int64_t D, X *dx, float *dweight) {         \
        rms_norm_backward(dy, x, weight, scale, other, T, D, dx, dweight);                                            \
    }                                                                                                                 \
    extern "C" void rotate_##suffix(const Heads<X> *from, const X *cos, const X *sin, const Heads<X> *to, int64_t T,  \
                                    int64_t P, int64_t H, int64_t G, int64_t d, bool back) {                          \
        rotate(*from, cos, sin, *to, T, P, H, G, d, back);                                                            \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)

extern "C" bool cross_entropy_float32(float *logits, const int64_t *target, int64_t t, int64_t V, float *nats) {
    return cross_entropy(logits, target, t, V, nats);
}
