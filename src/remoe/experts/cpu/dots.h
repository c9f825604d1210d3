// Products of two rows of weights with a few rows of tokens, for the number formats of weights.
//
// Legend: K numbers of a row, R rows of tokens.

#pragma once

#include "gemm.h"
#include "rows.h"

namespace {

typedef uint16_t bits16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits32 __attribute__((vector_size(4 * LANES), may_alias));
typedef int8_t signed8 __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t bits8 __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t signed32 __attribute__((vector_size(4 * LANES), may_alias));

inline vec load_vec(const float *p) { return *(const vec *)p; }
inline vec load_vec(const bfloat16 *p) { return (vec)(__builtin_convertvector(*(const bits16 *)p, bits32) << 16); }
inline vec load_vec(const int8_t *p) {
    return __builtin_convertvector(__builtin_convertvector(*(const signed8 *)p, signed32), vec);
}
inline vec to_vec(bits8 b) { return __builtin_convertvector(__builtin_convertvector(b, signed32), vec); }

inline float load(int8_t x) { return x; }

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
template <int R, typename W, typename X>
inline void dots_of(const W *v_K, const W *w_K, int64_t step, const X *const *x_iK, int64_t K, float out[2][ROWS]) {
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

// Weights as they are. `from` is the matrix without its first rows; `dots` takes two of its rows.
template <typename W>
struct Plain {
    const W *weight;
    int64_t K;

    Plain from(int64_t row) const { return {weight + row * K, K}; }

    template <int R, typename X>
    void dots(int64_t row, int64_t other, int64_t step, const X *const *x_iK, float out[2][ROWS]) const {
        dots_of<R>(weight + row * K, weight + other * K, step * K, x_iK, K, out);
    }
};

// 8 bits with a scale for each row.
struct Scaled {
    const int8_t *weight;
    const float *scale;
    int64_t K;

    Scaled from(int64_t row) const { return {weight + row * K, scale + row, K}; }

    template <int R, typename X>
    void dots(int64_t row, int64_t other, int64_t step, const X *const *x_iK, float out[2][ROWS]) const {
        dots_of<R>(weight + row * K, weight + other * K, step * K, x_iK, K, out);
        for (int i = 0; i < R; i++) out[0][i] *= scale[row], out[1][i] *= scale[other];
    }
};

const int64_t GROUP = 32, HEADER = 4, BYTES = HEADER + GROUP / 2;  // of remoe/experts/packed.py

// 4 bits with a scale and a least value for each group.
struct Packed {
    const uint8_t *bytes;
    int64_t K;

    int64_t width() const { return K / GROUP * BYTES; }
    Packed from(int64_t row) const { return {bytes + row * width(), K}; }

    template <int R, typename X>
    void dots(int64_t row, int64_t other, int64_t step, const X *const *x_iK, float out[2][ROWS]) const {
        const uint8_t *v = bytes + row * width(), *w = bytes + other * width();
        vec v_sum[R] = {}, w_sum[R] = {};
        for (int64_t k = 0; k < K; k += GROUP, v += BYTES, w += BYTES) {
            __builtin_prefetch(v + step * width(), 0, 2);
            __builtin_prefetch(w + step * width(), 0, 2);
            bfloat16 head[4];
            std::memcpy(head, v, HEADER);
            std::memcpy(head + 2, w, HEADER);
            const float v_scale = load(head[0]), v_least = load(head[1]);
            const float w_scale = load(head[2]), w_least = load(head[3]);
            for (int64_t j = 0; j < GROUP / 2; j += LANES) {
                const bits8 v_byte = *(const bits8 *)(v + HEADER + j), w_byte = *(const bits8 *)(w + HEADER + j);
                const vec v_low = to_vec(v_byte & 15) * v_scale + v_least;
                const vec v_high = to_vec(v_byte >> 4) * v_scale + v_least;
                const vec w_low = to_vec(w_byte & 15) * w_scale + w_least;
                const vec w_high = to_vec(w_byte >> 4) * w_scale + w_least;
#pragma GCC unroll 8
                for (int i = 0; i < R; i++) {
                    const vec low = load_vec(x_iK[i] + k + j), high = load_vec(x_iK[i] + k + GROUP / 2 + j);
                    v_sum[i] += v_low * low + v_high * high, w_sum[i] += w_low * low + w_high * high;
                }
            }
        }
        for (int i = 0; i < R; i++) out[0][i] = sum_of(v_sum[i]), out[1][i] = sum_of(w_sum[i]);
    }
};

// `dots` of a matrix for `rows` <= ROWS rows of tokens. Not inlined: two loops call it, and a compiler would make each
// of its cases twice, which takes it seconds.
template <typename M, typename X>
__attribute__((noinline)) void dots(const M &matrix, int64_t row, int64_t other, int64_t step, const X *const *x_iK,
                                    int64_t rows, float out[2][ROWS]) {
    switch (rows) {
        case 1: return matrix.template dots<1>(row, other, step, x_iK, out);
        case 2: return matrix.template dots<2>(row, other, step, x_iK, out);
        case 3: return matrix.template dots<3>(row, other, step, x_iK, out);
        case 4: return matrix.template dots<4>(row, other, step, x_iK, out);
        case 5: return matrix.template dots<5>(row, other, step, x_iK, out);
        case 6: return matrix.template dots<6>(row, other, step, x_iK, out);
        case 7: return matrix.template dots<7>(row, other, step, x_iK, out);
        default: return matrix.template dots<ROWS>(row, other, step, x_iK, out);
    }
}

}  // namespace
