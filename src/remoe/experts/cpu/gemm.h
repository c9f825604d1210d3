// Matrix product of one thread, for the few hundred rows of an expert's block.
//
// Panels of op(b), then of op(a), are packed so that the innermost loop reads both in order; it keeps a tile of MR rows
// by two vectors of c in registers. Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008). Widths follow the vector registers that the compiler has been told of.
//
// Panels are made of units of 32 bits: a float32, or two bfloat16 that follow each other in k, which AVX512-BF16
// multiplies and adds in one go.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "rows.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
const int LANES = 16, MR = 12;
#elif defined(__AVX__)
const int LANES = 8, MR = 6;
#elif defined(__aarch64__)
const int LANES = 4, MR = 12;
#else
const int LANES = 4, MR = 4;
#endif
const int NR = 2 * LANES;
const int64_t KC = 256, MC = 20 * MR, NC = 16 * NR;  // a panel of b in the first cache, a block of a in the second

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t int4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, int4{i, j, k, l})
#endif

// How many numbers of a type are a unit, and the product of one unit of a with a vector of units of b.
template <typename X>
struct Units;

template <>
struct Units<float> {
    static const int NUMBERS = 1;
    static vec multiply_add(const float *a, vec b, vec sum) { return sum + *a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Units<bfloat16> {
    static const int NUMBERS = 2;
    static vec multiply_add(const float *a, vec b, vec sum) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(*a), (__m512bh)b);
    }
};
#endif

inline float unit(const float *k0, const float *) { return *k0; }

// Two numbers side by side; zero in place of the second where there is none.
inline float unit(const bfloat16 *k0, const bfloat16 *k1) {
    uint32_t bits = k0->bits | uint32_t(k1 ? k1->bits : 0) << 16;
    float both;
    std::memcpy(&both, &bits, 4);
    return both;
}

// Units along k of `size` rows, for K numbers each: to[u * width + i] = unit u of row i; zero for size <= i < width.
template <typename X>
inline void pack_transposed(const X *from, int64_t stride, int64_t size, int64_t K, int64_t width, float *to) {
    const int NUMBERS = Units<X>::NUMBERS;
    const int64_t whole = K / NUMBERS, units = (K + NUMBERS - 1) / NUMBERS;
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) {
        const X *row = from + i * stride;
        int64_t u = 0;
        for (; u + 4 <= whole; u += 4) {
            const X *at = row + u * NUMBERS;
            vec4 a = *(const vec4 *)at, b = *(const vec4 *)(at + stride);
            vec4 c = *(const vec4 *)(at + 2 * stride), d = *(const vec4 *)(at + 3 * stride);
            vec4 ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
            *(vec4 *)(to + u * width + i) = SHUFFLE(ab, cd, 0, 1, 4, 5);
            *(vec4 *)(to + (u + 1) * width + i) = SHUFFLE(ab, cd, 2, 3, 6, 7);
            ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
            *(vec4 *)(to + (u + 2) * width + i) = SHUFFLE(ab, cd, 0, 1, 4, 5);
            *(vec4 *)(to + (u + 3) * width + i) = SHUFFLE(ab, cd, 2, 3, 6, 7);
        }
        for (; u < units; u++)
            for (int64_t j = 0; j < 4; j++) {
                const X *k0 = row + j * stride + u * NUMBERS;
                to[u * width + i + j] = unit(k0, u < whole ? k0 + 1 : nullptr);
            }
    }
    for (; i < width; i++)
        for (int64_t u = 0; u < units; u++) {
            const X *k0 = from + i * stride + u * NUMBERS;
            to[u * width + i] = i < size ? unit(k0, u < whole ? k0 + 1 : nullptr) : 0;
        }
}

// The same of an operand whose rows are along i: K rows of `size` numbers.
template <typename X>
inline void pack_rows(const X *from, int64_t stride, int64_t size, int64_t K, int64_t width, float *to) {
    const int NUMBERS = Units<X>::NUMBERS;
    for (int64_t k = 0; k < K; k += NUMBERS, to += width) {
        const X *k0 = from + k * stride, *k1 = k0 + stride;
        if (k + NUMBERS <= K)
            for (int64_t i = 0; i < size; i++) to[i] = unit(k0 + i, k1 + i);
        else
            for (int64_t i = 0; i < size; i++) to[i] = unit(k0 + i, nullptr);
        for (int64_t i = size; i < width; i++) to[i] = 0;
    }
}

// One tile: c = a b (+ c), from panels a (units, MR) and b (units, NR). Only `rows` by `columns` of it are written.
template <typename X, int ROWS, typename C>
inline void tile(const float *a, const float *b, int64_t units, bool add, C *c, int64_t ldc, int rows, int columns) {
    vec sum[ROWS][2] = {};
    for (int64_t u = 0; u < units; u++, a += MR, b += NR) {
        const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] = Units<X>::multiply_add(a + i, b0, sum[i][0]);
            sum[i][1] = Units<X>::multiply_add(a + i, b1, sum[i][1]);
        }
    }
    if constexpr (std::is_same_v<C, float>)
        if (columns == NR) {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                vec *to = (vec *)(c + i * ldc), *next = (vec *)(c + i * ldc + LANES);
                *to = add ? *to + sum[i][0] : sum[i][0];
                *next = add ? *next + sum[i][1] : sum[i][1];
            }
            return;
        }
    float rest[ROWS][NR];
    std::memcpy(rest, sum, sizeof(rest));
    for (int i = 0; i < rows; i++) {
        C *to = c + i * ldc;
        if (add)
            for (int j = 0; j < columns; j++) store(to + j, load(to[j]) + rest[i][j]);
        else
            for (int j = 0; j < columns; j++) store(to + j, rest[i][j]);
    }
}

// Row-major c (M, N) = op(a) op(b), added to c when `add`; `a_transposed`: a is stored (K, M). Sums are in float32, and
// rounded to c's type every KC units.
template <typename X, typename C>
inline void multiply(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const X *a, int64_t lda,
                     const X *b, int64_t ldb, bool add, C *c, int64_t ldc) {
    static thread_local std::vector<float> memory;
    memory.resize(KC * (NC + MC + NR + MR) + 2 * LANES);
    float *packed_b = memory.data(), *packed_a = packed_b + KC * (NC + NR);
    const int64_t NUMBERS = Units<X>::NUMBERS, all = (K + NUMBERS - 1) / NUMBERS;
    const int64_t parts = std::max<int64_t>(1, (all + KC - 1) / KC);
    for (int64_t j0 = 0; j0 < N; j0 += NC) {
        const int64_t width = std::min(NC, N - j0);
        for (int64_t p = 0; p < parts; p++) {
            const int64_t units = all * (p + 1) / parts - all * p / parts;
            const int64_t k0 = all * p / parts * NUMBERS, depth = std::min(units * NUMBERS, K - k0);
            for (int64_t j = 0; j < width; j += NR) {
                const int64_t size = std::min<int64_t>(NR, width - j);
                float *to = packed_b + j * units;
                if (b_transposed)
                    pack_transposed(b + (j0 + j) * ldb + k0, ldb, size, depth, NR, to);
                else
                    pack_rows(b + k0 * ldb + j0 + j, ldb, size, depth, NR, to);
            }
            for (int64_t i0 = 0; i0 < M; i0 += MC) {
                const int64_t height = std::min(MC, M - i0);
                for (int64_t i = 0; i < height; i += MR) {
                    const int64_t size = std::min<int64_t>(MR, height - i);
                    float *to = packed_a + i * units;
                    if (a_transposed)
                        pack_rows(a + k0 * lda + i0 + i, lda, size, depth, MR, to);
                    else
                        pack_transposed(a + (i0 + i) * lda + k0, lda, size, depth, MR, to);
                }
                for (int64_t j = 0; j < width; j += NR)
                    for (int64_t i = 0; i < height; i += MR) {
                        const int rows = int(std::min<int64_t>(MR, height - i));
                        const int columns = int(std::min<int64_t>(NR, width - j));
                        const float *pa = packed_a + i * units, *pb = packed_b + j * units;
                        C *to = c + (i0 + i) * ldc + j0 + j;
                        if (2 * rows > MR)
                            tile<X, MR>(pa, pb, units, add || p, to, ldc, rows, columns);
                        else
                            tile<X, MR / 2>(pa, pb, units, add || p, to, ldc, rows, columns);
                    }
            }
        }
    }
}

}  // namespace
