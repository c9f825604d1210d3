// Matrix product of one thread: ours (gemm.h), or that of the library which PyTorch carries. In bfloat16 the library's
// uses AMX, where the processor has it.

#pragma once

#include "gemm.h"

#include <atomic>
#include <chrono>

namespace {

bool products_timed = false;
std::atomic<int64_t> product_nanoseconds{0};  // of all threads together, while products are timed

struct ProductTimer {
    using Clock = std::chrono::steady_clock;
    const bool on = products_timed;
    const Clock::time_point start = on ? Clock::now() : Clock::time_point();

    ~ProductTimer() {
        if (on) product_nanoseconds += std::chrono::nanoseconds(Clock::now() - start).count();
    }
};

// The BLAS function, in Fortran's order: column-major c (m, n) = op(a) op(b) + beta c.
template <typename X>
using Gemm = void (*)(const char *a_transposed, const char *b_transposed, const int *m, const int *n, const int *k,
                      const float *alpha, const X *a, const int *lda, const X *b, const int *ldb, const float *beta,
                      float *c, const int *ldc);

// MKL's, where it is faster than ours; there, it runs on the calling thread alone.
template <typename X>
Gemm<X> library_gemm = nullptr;

// As `product`, by the library.
template <typename X>
inline void library_product(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const X *a,
                            int64_t lda, const X *b, int64_t ldb, bool add, float *c, int64_t ldc) {
    // Row-major matrices are their transposes in column-major order: c^T = op(b)^T op(a)^T.
    const int m = int(N), n = int(M), k = int(K), ld_b = int(ldb), ld_a = int(lda), ld_c = int(ldc);
    const float one = 1, beta = add ? 1 : 0;
    library_gemm<X>(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &m, &n, &k, &one, b, &ld_b, a, &ld_a, &beta, c,
                    &ld_c);
}

// As `multiply` in gemm.h: row-major c (M, N) = op(a) op(b), added to c when `add`.
template <typename X, typename C>
inline void product(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const X *a, int64_t lda,
                    const X *b, int64_t ldb, bool add, C *c, int64_t ldc) {
    const ProductTimer timer;
    if (library_gemm<X> && M && N) {
        if constexpr (std::is_same_v<C, float>) {
            library_product(a_transposed, b_transposed, M, N, K, a, lda, b, ldb, add, c, ldc);
        } else {  // the library's products are in float32, which are rounded once
            static thread_local std::vector<float> memory;
            memory.resize(M * N);
            library_product(a_transposed, b_transposed, M, N, K, a, lda, b, ldb, false, memory.data(), N);
            for (int64_t i = 0; i < M; i++) {
                const float *from = memory.data() + i * N;
                C *to = c + i * ldc;
                if (add)
                    for (int64_t j = 0; j < N; j++) store(to + j, load(to[j]) + from[j]);
                else
                    for (int64_t j = 0; j < N; j++) store(to + j, from[j]);
            }
        }
        return;
    }
    multiply(a_transposed, b_transposed, M, N, K, a, lda, b, ldb, add, c, ldc);
}

}  // namespace
