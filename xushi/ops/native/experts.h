// The routed experts: rows sorted by expert, products per expert, and each token's results summed in a fixed order.

#pragma once

#include <utility>

#include "pointwise.h"
#include "products.h"

namespace {

// Runs `pack(e, memory)` for each expert with rows, then `compute(e, first row, rows, packed)` over all its rows. Works
// in waves of as many experts as fit into 16 MiB of packed weights, at least one.
template <class Pack, class Compute>
void over_experts(const int32_t* bounds, Int E, Int size, Int threads, Pack pack, Compute compute) {
    const Int wave = std::min(E, std::max<Int>(1, (Int{1} << 22) / size));
    Word* packed = shared_packed.take<Word>(wave * size);
    for (Int e0 = 0; e0 < E; e0 += wave) {
        const Int e1 = std::min(E, e0 + wave);
        std::vector<std::pair<Int, Int>> tasks;
        for (Int e = e0; e < e1; e++)
            for (Int row = bounds[e]; row < bounds[e + 1]; row += ROWS) tasks.emplace_back(e, row);
        pool().run(e1 - e0, threads, [&](Int i) {
            if (bounds[e0 + i] < bounds[e0 + i + 1]) pack(e0 + i, packed + i * size);
        });
        pool().run(tasks.size(), threads, [&](Int i) {
            const auto [e, row] = tasks[i];
            compute(e, row, std::min<Int>(ROWS, bounds[e + 1] - row), packed + (e - e0) * size);
        });
    }
}

// out [N, D] = for each token, the sum of its k rows of y [P, D], times their weights unless `weights` is null.
void combine(const float* y, const int32_t* place, const float* weights, Value* out, Int N, Int k, Int D, Int threads) {
    pool().run(blocks(N, 64), threads, [&](Int task) {
        for (Int n = task * 64; n < std::min(N, task * 64 + 64); n++) {
            for (Int j = 0; j < D; j += L) {
                Vec sum = {};
                for (Int i = 0; i < k; i++)
                    sum += part(y + place[n * k + i] * D + j, D - j) *
                           broadcast(weights == nullptr ? 1.0f : weights[n * k + i]);
                store_part(out + n * D + j, D - j, sum);
            }
        }
    });
}

}  // namespace

extern "C" {

// Sorts the (token, expert) pairs by expert. `rows` [P] gives the flat index into [N, k] of each sorted row, `place`
// [P] the sorted row of each pair, and `bounds` [E + 1] the first row of each expert, with the end last.
void xushi_sort_by_expert(const Int* indices, Int pairs, Int experts, int32_t* rows, int32_t* place, int32_t* bounds) {
    std::fill(bounds, bounds + experts + 1, 0);
    for (Int i = 0; i < pairs; i++) bounds[indices[i] + 1]++;
    for (Int e = 0; e < experts; e++) bounds[e + 1] += bounds[e];
    std::vector<int32_t> next(bounds, bounds + experts);
    for (Int i = 0; i < pairs; i++) {
        place[i] = next[indices[i]]++;
        rows[place[i]] = static_cast<int32_t>(i);
    }
}

// out [N, D] = sum over a token's experts of weight * down(silu(gate x) * up x), for x [N, D], gate_up [E, 2F, D] and
// down [E, D, F]. h [P, 2F] receives the gate and up products for the backward pass. limit 0: no clamp.
void xushi_experts(const Value* x, const float* weights, const float* gate_up, const float* down, const int32_t* rows,
                   const int32_t* place, const int32_t* bounds, Value* h, Value* out, Int N, Int k, Int D, Int F, Int E,
                   float limit, Int threads) {
    float* y = shared_rows.take(N * k * D);
    const Int first = panels(2 * F) * NR * words(D), size = first + panels(D) * NR * words(F);
    over_experts(bounds, E, size, threads,
        [&](Int e, Word* packed) {
            pack_matrix(gate_up + e * 2 * F * D, D, 2 * F, true, 1, packed);
            pack_matrix(down + e * D * F, F, D, true, 1, packed + first);
        },
        [&](Int, Int row, Int m, const Word* packed) {
            const Value *a[ROWS] = {}, *inner[ROWS] = {};
            Value* act = local_a.take<Value>(ROWS * F);
            for (Int i = 0; i < m; i++) {
                a[i] = x + rows[row + i] / k * D;
                inner[i] = act + i * F;
            }
            multiply(m, 2 * F, D, a, packed, words(D) * NR, h + row * 2 * F, 2 * F, false);
            for (Int i = 0; i < m; i++) {
                const Value* pair = h + (row + i) * 2 * F;
                swiglu(pair, pair + F, act + i * F, F, limit);
            }
            multiply(m, D, F, inner, packed + first, words(F) * NR, y + row * D, D, false);
        });
    combine(y, place, weights, out, N, k, D, threads);
}

// Gradients of xushi_experts: dx [N, D], d_weights [N, k], d_gate_up [E, 2F, D] and d_down [E, D, F].
void xushi_experts_backward(const Value* x, const float* weights, const float* gate_up, const float* down,
                            const int32_t* rows, const int32_t* place, const int32_t* bounds, const Value* h,
                            const Value* d_out, Value* dx, float* d_weights, float* d_gate_up, float* d_down, Int N,
                            Int k, Int D, Int F, Int E, float limit, Int threads) {
    const Int P = N * k, first = panels(F) * NR * words(D), size = first + panels(D) * NR * words(2 * F);
    Value* dh = shared_more.take<Value>(P * 3 * F);
    Value* act = dh + P * 2 * F;
    float* dx_rows = shared_rows.take(P * D);
    over_experts(bounds, E, size, threads,
        [&](Int e, Word* packed) {
            pack_matrix(down + e * D * F, D, F, false, 1, packed);
            pack_matrix(gate_up + e * 2 * F * D, 2 * F, D, false, 1, packed + first);
        },
        [&](Int, Int row, Int m, const Word* packed) {
            const Value *dy[ROWS] = {}, *inner[ROWS] = {};
            float* da = local_a.take(ROWS * F);
            for (Int i = 0; i < m; i++) {
                dy[i] = d_out + rows[row + i] / k * D;
                inner[i] = dh + (row + i) * 2 * F;
            }
            multiply(m, F, D, dy, packed, words(D) * NR, da, F, false);
            for (Int i = 0; i < m; i++) {
                const Int r = row + i, flat = rows[r];
                const Value* pair = h + r * 2 * F;
                Value* d = dh + r * 2 * F;
                d_weights[flat] = swiglu_backward(pair, pair + F, da + i * F, weights[flat], act + r * F, d, d + F, F,
                                                  limit);
            }
            multiply(m, D, 2 * F, inner, packed + first, words(2 * F) * NR, dx_rows + row * D, D, false);
        });
    pool().run(2 * E, threads, [&](Int task) {
        const Int e = task / 2, begin = bounds[e], count = bounds[e + 1] - begin;
        if (task % 2 == 0) {
            outer(count, 2 * F, D, [&](Int r) { return dh + (begin + r) * 2 * F; },
                  [&](Int r) { return x + rows[begin + r] / k * D; }, d_gate_up + e * 2 * F * D);
        } else {
            outer(count, D, F, [&](Int r) { return d_out + rows[begin + r] / k * D; },
                  [&](Int r) { return act + (begin + r) * F; }, d_down + e * D * F);
        }
    });
    combine(dx_rows, place, nullptr, dx, N, k, D, threads);
}

}  // extern "C"
