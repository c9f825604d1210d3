// Matrix product of one thread, for the few hundred rows of an expert's block.
//
// Panels of op(b), then of op(a), are packed so that the innermost loop reads both in order; it keeps a tile of MR rows
// by two vectors of c in registers. Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008). Widths follow the vector registers that the compiler has been told of.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

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
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t int4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, int4{i, j, k, l})
#endif

// to[k * width + i] = from[i * stride + k] for i < size, zero for size <= i < width
inline void pack_transposed(const float *from, int64_t stride, int64_t size, int64_t K, int64_t width, float *to) {
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) {
        const float *row = from + i * stride;
        int64_t k = 0;
        for (; k + 4 <= K; k += 4) {
            vec4 a = *(const vec4 *)(row + k), b = *(const vec4 *)(row + stride + k);
            vec4 c = *(const vec4 *)(row + 2 * stride + k), d = *(const vec4 *)(row + 3 * stride + k);
            vec4 ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
            *(vec4 *)(to + k * width + i) = SHUFFLE(ab, cd, 0, 1, 4, 5);
            *(vec4 *)(to + (k + 1) * width + i) = SHUFFLE(ab, cd, 2, 3, 6, 7);
            ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
            *(vec4 *)(to + (k + 2) * width + i) = SHUFFLE(ab, cd, 0, 1, 4, 5);
            *(vec4 *)(to + (k + 3) * width + i) = SHUFFLE(ab, cd, 2, 3, 6, 7);
        }
        for (; k < K; k++)
            for (int64_t j = 0; j < 4; j++) to[k * width + i + j] = row[j * stride + k];
    }
    for (; i < width; i++)
        for (int64_t k = 0; k < K; k++) to[k * width + i] = i < size ? from[i * stride + k] : 0;
}

// to[k * width + i] = from[k * stride + i] for i < size, zero for size <= i < width
inline void pack_rows(const float *from, int64_t stride, int64_t size, int64_t K, int64_t width, float *to) {
    for (int64_t k = 0; k < K; k++) {
        std::memcpy(to + k * width, from + k * stride, size * sizeof(float));
        for (int64_t i = size; i < width; i++) to[k * width + i] = 0;
    }
}

// One tile: c = a b (+ c), from panels a (K, MR) and b (K, NR). Only `rows` by `columns` of it are written.
template <int ROWS>
inline void tile(const float *a, const float *b, int64_t K, bool add, float *c, int64_t ldc, int rows, int columns) {
    vec sum[ROWS][2] = {};
    for (int64_t k = 0; k < K; k++, a += MR, b += NR) {
        const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
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
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[i * ldc + j] = (add ? c[i * ldc + j] : 0) + rest[i][j];
}

// Row-major c (M, N) = op(a) op(b), added to c when `add`; `a_transposed`: a is stored (K, M).
inline void multiply(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const float *a, int64_t lda,
                     const float *b, int64_t ldb, bool add, float *c, int64_t ldc) {
    static thread_local std::vector<float> memory;
    memory.resize(KC * (NC + MC + NR + MR) + 2 * LANES);
    float *packed_b = memory.data(), *packed_a = packed_b + KC * (NC + NR);
    const int64_t parts = std::max<int64_t>(1, (K + KC - 1) / KC);
    for (int64_t j0 = 0; j0 < N; j0 += NC) {
        const int64_t width = std::min(NC, N - j0);
        for (int64_t p = 0; p < parts; p++) {
            const int64_t k0 = K * p / parts, depth = K * (p + 1) / parts - k0;
            for (int64_t j = 0; j < width; j += NR) {
                const int64_t size = std::min<int64_t>(NR, width - j);
                float *to = packed_b + j * depth;
                if (b_transposed)
                    pack_transposed(b + (j0 + j) * ldb + k0, ldb, size, depth, NR, to);
                else
                    pack_rows(b + k0 * ldb + j0 + j, ldb, size, depth, NR, to);
            }
            for (int64_t i0 = 0; i0 < M; i0 += MC) {
                const int64_t height = std::min(MC, M - i0);
                for (int64_t i = 0; i < height; i += MR) {
                    const int64_t size = std::min<int64_t>(MR, height - i);
                    float *to = packed_a + i * depth;
                    if (a_transposed)
                        pack_rows(a + k0 * lda + i0 + i, lda, size, depth, MR, to);
                    else
                        pack_transposed(a + (i0 + i) * lda + k0, lda, size, depth, MR, to);
                }
                for (int64_t j = 0; j < width; j += NR)
                    for (int64_t i = 0; i < height; i += MR) {
                        const int rows = int(std::min<int64_t>(MR, height - i));
                        const int columns = int(std::min<int64_t>(NR, width - j));
                        const float *pa = packed_a + i * depth, *pb = packed_b + j * depth;
                        float *to = c + (i0 + i) * ldc + j0 + j;
                        if (2 * rows > MR)
                            tile<MR>(pa, pb, depth, add || p, to, ldc, rows, columns);
                        else
                            tile<MR / 2>(pa, pb, depth, add || p, to, ldc, rows, columns);
                    }
            }
        }
    }
}

}  // namespace
