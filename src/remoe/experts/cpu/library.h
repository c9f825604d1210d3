// Matrix product of one thread: ours (gemm.h), or that of the library which PyTorch carries.

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
typedef void (*Sgemm)(const char *a_transposed, const char *b_transposed, const int *m, const int *n, const int *k,
                      const float *alpha, const float *a, const int *lda, const float *b, const int *ldb,
                      const float *beta, float *c, const int *ldc);

Sgemm library_sgemm = nullptr;  // MKL's, where it is faster than ours; there, it runs on the calling thread alone

// As `multiply` in gemm.h: row-major c (M, N) = op(a) op(b), added to c when `add`.
template <typename X, typename C>
inline void product(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const X *a, int64_t lda,
                    const X *b, int64_t ldb, bool add, C *c, int64_t ldc) {
    const ProductTimer timer;
    if constexpr (std::is_same_v<X, float> && std::is_same_v<C, float>)
        if (library_sgemm && M && N) {
            // Row-major matrices are their transposes in column-major order: c^T = op(b)^T op(a)^T.
            const int m = int(N), n = int(M), k = int(K), ld_b = int(ldb), ld_a = int(lda), ld_c = int(ldc);
            const float one = 1, beta = add ? 1 : 0;
            library_sgemm(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &m, &n, &k, &one, b, &ld_b, a, &ld_a,
                          &beta, c, &ld_c);
            return;
        }
    multiply(a_transposed, b_transposed, M, N, K, a, lda, b, ldb, add, c, ldc);
}

}  // namespace
