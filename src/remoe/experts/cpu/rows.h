// Rows of the elementwise work between the matrix products, and number formats. Included by the .cpp files beside it.
//
// Legend: D model width, F expert width.

#pragma once

#include <cstdint>
#include <cstring>

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

// exp in single precision to 2 units in the last place, of x within -60 and 60, in arithmetic that compilers vectorise:
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) by its series to r^7.
inline float exponential(float x) {
    // exp(60) and exp(-60) and their products with other numbers are far from subnormal: compilers compute both sides
    // of a choice for all lanes, and on Intel's processors a subnormal product takes 150 cycles. NaN passes.
    x = x > 60.0f ? 60.0f : (x < -60.0f ? -60.0f : x);
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

// hidden = silu(gate half) * up half * gate of the pair
template <typename X>
inline void swiglu_row(const X *pre_2F, float gate, int64_t F, X *hidden_F) {
    const X *a = pre_2F, *b = pre_2F + F;
#pragma omp simd
    for (int64_t f = 0; f < F; f++) {
        float z = load(a[f]);
        store(hidden_F + f, z * sigmoid(z) * load(b[f]) * gate);
    }
}

// From d loss / d hidden: the hidden activation again and the gradient of the pre-activations; returns the gate's.
template <typename X>
inline float swiglu_backward_row(const X *pre_2F, const X *dhidden_F, float gate, int64_t F, X *hidden_F, X *dpre_2F) {
    const X *a = pre_2F, *b = pre_2F + F;
    X *da = dpre_2F, *db = dpre_2F + F;
    float dgate = 0;
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
    return dgate;
}

template <typename X>
inline void add_row(const X *row_D, int64_t D, float *sum_D) {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) sum_D[d] += load(row_D[d]);
}

}  // namespace
