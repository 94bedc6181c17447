// Causal attention within documents, forward and backward. Keys and values may have different widths.

#pragma once

#include "products.h"

namespace {

// A tensor [B, T, H, width] whose last axis is contiguous.
struct Heads {
    const Value* data;
    Int batch, position, head;
    const Value* at(Int b, Int t, Int h) const { return data + b * batch + t * position + h * head; }
};

// Pack all positions of a head: [T, width] with panels of its columns, and transposed with panels of positions.
void pack_head(const Heads& x, Int b, Int h, Int T, Int width, Word* packed) {
    pack_block([&](Int t) { return x.at(b, t, h); }, 0, T, 0, width, packed);
}
void pack_transposed(const Heads& x, Int b, Int h, Int T, Int width, Word* packed) {
    for (Int t = 0; t < T; t += NR, packed += words(width) * NR)
        pack_columns(x.at(b, t, h), x.position, width, T - t, packed);
}

}  // namespace

extern "C" {

// Causal attention within documents: query t attends to keys starts[b, t] to t. q, k, v [B, T, H, width] have the given
// strides over batch, position and head (three each); out [B, T, H, V] is contiguous; `lse` [B, H, T] receives the
// log-sum-exp of the scaled scores.
void xushi_attention(const Value* q, const Value* k, const Value* v, const Int* strides, const int32_t* starts,
                     Value* out, float* lse, Int B, Int T, Int H, Int K, Int V, float scale, Int threads) {
    const Heads Q{q, strides[0], strides[1], strides[2]}, Ks{k, strides[3], strides[4], strides[5]},
        Vs{v, strides[6], strides[7], strides[8]};
    const Int key_panels = panels(T), value_panels = panels(V);
    const Int keys_size = key_panels * words(K) * NR, size = keys_size + value_panels * words(T) * NR;
    Word* packed = shared_packed.take<Word>(B * H * size);
    pool().run(B * H, threads, [&](Int task) {
        const Int b = task / H, h = task % H;
        Word* here = packed + task * size;
        pack_transposed(Ks, b, h, T, K, here);
        pack_head(Vs, b, h, T, V, here + keys_size);
    });
    const Int query_blocks = blocks(T, QUERIES), ld = value_panels * NR;
    pool().run(B * H * query_blocks, threads, [&](Int task) {
        const Int head = task / query_blocks, b = head / H, h = head % H;
        const Int q0 = task % query_blocks * QUERIES, q1 = std::min(T, q0 + QUERIES), m = q1 - q0;
        const Word *keys = packed + head * size, *values = keys + keys_size;
        const int32_t* start = starts + b * T;
        float* scores = local_a.take(QUERIES * FORWARD_KEYS);
        float* sums = local_b.take(QUERIES * ld);
        std::fill(sums, sums + m * ld, 0.0f);
        const Value* rows[QUERIES] = {};
        const float* weights[QUERIES] = {};
        float largest[QUERIES], norm[QUERIES];
        Int first = q1;
        for (Int i = 0; i < m; i++) {
            rows[i] = Q.at(b, q0 + i, h);
            weights[i] = scores + i * FORWARD_KEYS;
            largest[i] = -INFINITY;
            norm[i] = 0;
            first = std::min<Int>(first, start[q0 + i]);
        }
        for (Int k0 = first / NR * NR; k0 < q1; k0 += FORWARD_KEYS) {
            const Int count = std::min(FORWARD_KEYS, q1 - k0);
            multiply(m, blocks(count, NR) * NR, K, rows, keys + k0 * words(K), words(K) * NR, scores, FORWARD_KEYS,
                     false);
            for (Int i = 0; i < m; i++) {
                float* row = scores + i * FORWARD_KEYS;
                const Int low = std::max<Int>(0, start[q0 + i] - k0), high = std::min(count, q0 + i + 1 - k0);
                if (low >= high) {
                    std::fill(row, row + count, 0.0f);
                    continue;
                }
                const float top = std::max(largest[i], maximum(row + low, high - low) * scale);
                std::fill(row, row + low, 0.0f);
                const float sum = exponentials(row + low, high - low, scale, top);
                std::fill(row + high, row + count, 0.0f);
                if (top > largest[i]) {
                    const float shrink = largest[i] == -INFINITY ? 0.0f : std::exp(largest[i] - top);
                    norm[i] *= shrink;
                    for (Int j = 0; j < ld; j += L)
                        store(sums + i * ld + j, load(sums + i * ld + j) * broadcast(shrink));
                    largest[i] = top;
                }
                norm[i] += sum;
            }
            multiply(m, V, count, weights, values + words(k0) * NR, words(T) * NR, sums, ld, true);
        }
        for (Int i = 0; i < m; i++) {
            const Int t = q0 + i;
            lse[head * T + t] = largest[i] + std::log(norm[i]);
            const Vec share = broadcast(1.0f / norm[i]);
            map(out + ((b * T + t) * H + h) * V, sums + i * ld, V, [&](Int, Vec value) { return value * share; });
        }
    });
}

// Gradients of q, k and v, contiguous [B, T, H, width]: P = exp(scale S - lse), dP = dO V^T, dS = P (dP - sum dO O).
void xushi_attention_backward(const Value* q, const Value* k, const Value* v, const Int* strides,
                              const int32_t* starts, const Value* out, const float* lse, const Value* d_out, Value* dq,
                              Value* dk, Value* dv, Int B, Int T, Int H, Int K, Int V, float scale, Int threads) {
    const Heads Q{q, strides[0], strides[1], strides[2]}, Ks{k, strides[3], strides[4], strides[5]},
        Vs{v, strides[6], strides[7], strides[8]}, O{out, T * H * V, H * V, V}, dO{d_out, T * H * V, H * V, V};
    constexpr Int ld = KEYS + 8;  // not a power of two, so that a column is spread over the cache's sets
    const Int key_panels = panels(T), wk = panels(K), wv = panels(V), ldk = wk * NR, ldv = wv * NR;
    pool().run(B * H, threads, [&](Int head) {
        const Int b = head / H, h = head % H;
        const int32_t* start = starts + b * T;
        const float* norm = lse + head * T;
        Word* keys_t = local_a.take<Word>(key_panels * NR * (words(K) + words(V)) + words(T) * (2 * ldk + ldv));
        Word* values_t = keys_t + key_panels * NR * words(K);
        Word* keys = values_t + key_panels * NR * words(V);
        Word* queries = keys + words(T) * ldk;
        Word* d_outs = queries + words(T) * ldk;
        pack_transposed(Ks, b, h, T, K, keys_t);
        pack_transposed(Vs, b, h, T, V, values_t);
        pack_head(Ks, b, h, T, K, keys);
        pack_head(Q, b, h, T, K, queries);
        pack_head(dO, b, h, T, V, d_outs);
        float* sum_q = local_sums.take(T * (2 * ldk + ldv + 1));
        float* sum_k = sum_q + T * ldk;
        float* sum_v = sum_k + T * ldk;
        float* mean = sum_v + T * ldv;
        std::fill(sum_q, mean, 0.0f);
        for (Int t = 0; t < T; t++) {
            Vec dot = {};
            for (Int i = 0; i < V; i += L) dot += part(O.at(b, t, h) + i, V - i) * part(dO.at(b, t, h) + i, V - i);
            mean[t] = sum_lanes(dot);
        }
        float *weights = local_b.take(QUERIES * ld), *d_scores = local_c.take(QUERIES * ld);
        for (Int k0 = 0; k0 < T; k0 += KEYS) {
            const Int in_block = std::min(KEYS, T - k0);
            for (Int q0 = k0; q0 < T; q0 += QUERIES) {
                const Int m = std::min(QUERIES, T - q0);
                const Int count = std::min(in_block, q0 + m - k0);  // no query of this block sees a later key
                const Value *rows[QUERIES] = {}, *d_rows[QUERIES] = {};
                const float* ds_rows[QUERIES] = {};
                Int first = T;
                for (Int i = 0; i < m; i++) {
                    rows[i] = Q.at(b, q0 + i, h);
                    d_rows[i] = dO.at(b, q0 + i, h);
                    ds_rows[i] = d_scores + i * ld;
                    first = std::min<Int>(first, start[q0 + i]);
                }
                if (first >= k0 + count) continue;
                const Int wide = blocks(count, NR) * NR;
                multiply(m, wide, K, rows, keys_t + k0 * words(K), words(K) * NR, weights, ld, false);
                multiply(m, wide, V, d_rows, values_t + k0 * words(V), words(V) * NR, d_scores, ld, false);
                for (Int i = 0; i < m; i++) {
                    float *w = weights + i * ld, *d = d_scores + i * ld;
                    const Int t = q0 + i;
                    const Int low = std::min(count, std::max<Int>(0, start[t] - k0));
                    const Int high = std::max(low, std::min(count, t + 1 - k0));
                    std::fill(w, w + low, 0.0f);
                    std::fill(d, d + low, 0.0f);
                    exponentials(w + low, high - low, scale, norm[t]);
                    map(d + low, d + low, high - low, [&](Int j, Vec value) {
                        return part(w + low + j, high - low - j) * (value - broadcast(mean[t])) * broadcast(scale);
                    });
                    std::fill(w + high, w + count, 0.0f);
                    std::fill(d + high, d + count, 0.0f);
                }
                const Int at_q = words(q0) * NR, behind = words(T) * NR;
                multiply_transposed(count, V, m, [&](Int i) { return weights + i * ld; }, d_outs + at_q, behind,
                                    sum_v + k0 * ldv, ldv, true);
                multiply_transposed(count, K, m, [&](Int i) { return d_scores + i * ld; }, queries + at_q, behind,
                                    sum_k + k0 * ldk, ldk, true);
                multiply(m, K, count, ds_rows, keys + words(k0) * NR, behind, sum_q + q0 * ldk, ldk, true);
            }
        }
        for (Int t = 0; t < T; t++) {
            const Int row = (b * T + t) * H + h;
            const auto same = [](Int, Vec v) { return v; };
            map(dq + row * K, sum_q + t * ldk, K, same);
            map(dk + row * K, sum_k + t * ldk, K, same);
            map(dv + row * V, sum_v + t * ldv, V, same);
        }
    });
}

}  // extern "C"
