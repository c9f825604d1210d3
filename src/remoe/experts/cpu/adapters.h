// Low-rank changes of the experts' weights (LoRA), computed on the pairs of a block: they are never added to a weight.
//
// Legend: E experts, I inputs and O outputs of a projection, r rank, m pairs of one block.

#pragma once

#include "library.h"

namespace {

// One projection's change b^T a for each expert. The gradients are not there in the forward pass; without a rank,
// nothing is done.
template <typename X>
struct LowRank {
    const X *a_ErI, *b_rEO;
    X *da_ErI, *db_rEO;
    int64_t r, E, I, O;

    int64_t numbers() const { return r * (I + O); }  // of one expert

    // out += in a^T b; t is scratch memory
    template <typename C>
    void add(int64_t e, int64_t m, const X *in_mI, X *t_mr, C *out_mO) const {
        if (!r) return;
        product(false, true, m, r, I, in_mI, I, a_ErI + e * r * I, I, false, t_mr, r);
        product(false, false, m, O, r, t_mr, r, b_rEO + e * O, E * O, true, out_mO, O);
    }

    // u = dout b^T and din += u a
    template <typename C>
    void add_transposed(int64_t e, int64_t m, const X *dout_mO, X *u_mr, C *din_mI) const {
        if (!r) return;
        product(false, true, m, r, O, dout_mO, O, b_rEO + e * O, E * O, false, u_mr, r);
        product(false, false, m, I, r, u_mr, r, a_ErI + e * r * I, I, true, din_mI, I);
    }

    // The gradients of a and b: da_rI = u^T in, and db = (in a^T)^T dout in rows of `stride` numbers
    template <typename C>
    void gradients(int64_t e, int64_t m, const X *in_mI, const X *dout_mO, const X *u_mr, X *t_mr, C *da_rI, C *db_rO,
                   int64_t stride) const {
        if (!r) return;
        product(true, false, r, I, m, u_mr, r, in_mI, I, false, da_rI, I);
        product(false, true, m, r, I, in_mI, I, a_ErI + e * r * I, I, false, t_mr, r);
        product(true, false, r, O, m, t_mr, r, dout_mO, O, false, db_rO, stride);
    }

    X *da(int64_t e) const { return da_ErI + e * r * I; }
    X *db(int64_t e) const { return db_rEO + e * O; }

    void clear_gradients(int64_t e) const {
        if (!r) return;
        std::memset(da(e), 0, r * I * sizeof(X));
        for (int64_t i = 0; i < r; i++) std::memset(db(e) + i * E * O, 0, O * sizeof(X));
    }

    // Writes the gradients of an expert, or adds to them: da_rI, then db_rO.
    void put_gradients(int64_t e, bool add, const float *sum) const {
        if (!r) return;
        put(sum, r * I, add, da(e));
        for (int64_t i = 0; i < r; i++) put(sum + r * I + i * O, O, add, db(e) + i * E * O);
    }

    static void put(const float *from, int64_t numbers, bool add, X *to) {
        for (int64_t i = 0; i < numbers; i++) store(to + i, add ? load(to[i]) + from[i] : from[i]);
    }
};

template <typename X>
struct Adapters {
    const LowRank<X> gate_up, down;

    int64_t rank() const { return gate_up.r + down.r; }
    int64_t numbers() const { return gate_up.numbers() + down.numbers(); }
};

}  // namespace
