// Causal attention inside documents, forward and backward, with keys and values of different widths.

#pragma once

#include "products.h"

namespace {

// A tensor [B, T, H, width] whose last axis is contiguous.
struct Heads {
    const float* data;
    Int batch, position, head;
    const float* at(Int b, Int t, Int h) const { return data + b * batch + t * position + h * head; }
};

}  // namespace

extern "C" {

// Causal attention inside documents: query t looks at keys starts[b, t] to t. Tensors [B, T, H, width] with the given
// strides over batch, position and head; out [B, T, H, V] contiguous; `lse` [B, H, T] is log sum exp of the scores.
void xushi_attention(const float* q, const float* k, const float* v, const Int* strides, const int32_t* starts,
                     float* out, float* lse, Int B, Int T, Int H, Int K, Int V, float scale, Int threads) {
    const Heads Q{q, strides[0], strides[1], strides[2]}, Ks{k, strides[3], strides[4], strides[5]},
        Vs{v, strides[6], strides[7], strides[8]};
    const Int key_panels = panels(T), value_panels = panels(V);
    const Int keys_size = key_panels * K * NR, size = keys_size + value_panels * T * NR;
    float* packed = shared_packed.take(B * H * size);
    pool().run(B * H, threads, [&](Int task) {
        const Int b = task / H, h = task % H;
        float* here = packed + task * size;
        for (Int p = 0; p < key_panels; p++)
            pack_columns(Ks.at(b, p * NR, h), Ks.position, K, T - p * NR, here + p * K * NR);
        for (Int p = 0; p < value_panels; p++)
            pack_rows(Vs.at(b, 0, h) + p * NR, Vs.position, T, V - p * NR, here + keys_size + p * T * NR);
    });
    const Int query_blocks = blocks(T, QUERIES), ld = value_panels * NR;
    pool().run(B * H * query_blocks, threads, [&](Int task) {
        const Int head = task / query_blocks, b = head / H, h = head % H;
        const Int q0 = task % query_blocks * QUERIES, q1 = std::min(T, q0 + QUERIES), m = q1 - q0;
        const float *keys = packed + head * size, *values = keys + keys_size;
        const int32_t* start = starts + b * T;
        float* scores = local_a.take(QUERIES * FORWARD_KEYS);
        float* sums = local_b.take(QUERIES * ld);
        std::fill(sums, sums + m * ld, 0.0f);
        const float *rows[QUERIES] = {}, *weights[QUERIES] = {};
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
            multiply(m, blocks(count, NR) * NR, K, rows, 1, keys + k0 * K, K * NR, scores, FORWARD_KEYS, false);
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
                    for (Int j = 0; j < ld; j += L) store(sums + i * ld + j, load(sums + i * ld + j) * all(shrink));
                    largest[i] = top;
                }
                norm[i] += sum;
            }
            multiply(m, V, count, weights, 1, values + k0 * NR, T * NR, sums, ld, true);
        }
        for (Int i = 0; i < m; i++) {
            const Int t = q0 + i;
            lse[head * T + t] = largest[i] + std::log(norm[i]);
            const Vec share = all(1.0f / norm[i]);
            map(out + ((b * T + t) * H + h) * V, sums + i * ld, V, [&](Int, Vec value) { return value * share; });
        }
    });
}

// Gradients of the above, [B, T, H, width] contiguous: P = exp(scale S - lse), dP = dO V^T, dS = P (dP - sum dO O).
void xushi_attention_backward(const float* q, const float* k, const float* v, const Int* strides,
                              const int32_t* starts, const float* out, const float* lse, const float* d_out, float* dq,
                              float* dk, float* dv, Int B, Int T, Int H, Int K, Int V, float scale, Int threads) {
    const Heads Q{q, strides[0], strides[1], strides[2]}, Ks{k, strides[3], strides[4], strides[5]},
        Vs{v, strides[6], strides[7], strides[8]}, O{out, T * H * V, H * V, V}, dO{d_out, T * H * V, H * V, V};
    constexpr Int ld = KEYS + 8;  // not a power of two: a column of it then spreads over the cache
    const Int key_panels = panels(T), wk = panels(K), wv = panels(V), ldk = wk * NR, ldv = wv * NR;
    pool().run(B * H, threads, [&](Int head) {
        const Int b = head / H, h = head % H;
        const int32_t* start = starts + b * T;
        const float* norm = lse + head * T;
        float* keys_t = local_a.take(key_panels * NR * (K + V) + T * (4 * ldk + 2 * ldv + 1));
        float* values_t = keys_t + key_panels * NR * K;
        float* keys = values_t + key_panels * NR * V;
        float* queries = keys + T * ldk;
        float* d_outs = queries + T * ldk;
        float* sum_q = d_outs + T * ldv;
        float* sum_k = sum_q + T * ldk;
        float* sum_v = sum_k + T * ldk;
        float* mean = sum_v + T * ldv;
        for (Int p = 0; p < key_panels; p++) {
            pack_columns(Ks.at(b, p * NR, h), Ks.position, K, T - p * NR, keys_t + p * K * NR);
            pack_columns(Vs.at(b, p * NR, h), Vs.position, V, T - p * NR, values_t + p * V * NR);
        }
        for (Int p = 0; p < wk; p++) {
            pack_rows(Ks.at(b, 0, h) + p * NR, Ks.position, T, K - p * NR, keys + p * T * NR);
            pack_rows(Q.at(b, 0, h) + p * NR, Q.position, T, K - p * NR, queries + p * T * NR);
        }
        for (Int p = 0; p < wv; p++) pack_rows(dO.at(b, 0, h) + p * NR, dO.position, T, V - p * NR, d_outs + p * T * NR);
        std::fill(sum_q, mean, 0.0f);
        for (Int t = 0; t < T; t++) {
            Vec dot = {};
            for (Int i = 0; i < V; i += L) dot += part(O.at(b, t, h) + i, V - i) * part(dO.at(b, t, h) + i, V - i);
            mean[t] = total(dot);
        }
        float *weights = local_b.take(QUERIES * ld), *d_scores = local_c.take(QUERIES * ld);
        for (Int k0 = 0; k0 < T; k0 += KEYS) {
            const Int in_block = std::min(KEYS, T - k0);
            for (Int q0 = k0; q0 < T; q0 += QUERIES) {
                const Int m = std::min(QUERIES, T - q0);
                const Int count = std::min(in_block, q0 + m - k0);  // on the diagonal the last keys are seen by none
                const float *rows[QUERIES] = {}, *d_rows[QUERIES] = {}, *ds_rows[QUERIES] = {};
                Int first = T;
                for (Int i = 0; i < m; i++) {
                    rows[i] = Q.at(b, q0 + i, h);
                    d_rows[i] = dO.at(b, q0 + i, h);
                    ds_rows[i] = d_scores + i * ld;
                    first = std::min<Int>(first, start[q0 + i]);
                }
                if (first >= k0 + count) continue;
                const Int wide = blocks(count, NR) * NR;
                multiply(m, wide, K, rows, 1, keys_t + k0 * K, K * NR, weights, ld, false);
                multiply(m, wide, V, d_rows, 1, values_t + k0 * V, V * NR, d_scores, ld, false);
                for (Int i = 0; i < m; i++) {
                    float *w = weights + i * ld, *d = d_scores + i * ld;
                    const Int t = q0 + i;
                    const Int low = std::min(count, std::max<Int>(0, start[t] - k0));
                    const Int high = std::max(low, std::min(count, t + 1 - k0));
                    std::fill(w, w + low, 0.0f);
                    std::fill(d, d + low, 0.0f);
                    exponentials(w + low, high - low, scale, norm[t]);
                    map(d + low, d + low, high - low, [&](Int j, Vec value) {
                        return part(w + low + j, high - low - j) * (value - all(mean[t])) * all(scale);
                    });
                    std::fill(w + high, w + count, 0.0f);
                    std::fill(d + high, d + count, 0.0f);
                }
                multiply_transposed(count, V, m, weights, ld, d_outs + q0 * NR, T * NR, sum_v + k0 * ldv, ldv, true);
                multiply_transposed(count, K, m, d_scores, ld, queries + q0 * NR, T * NR, sum_k + k0 * ldk, ldk, true);
                multiply(m, K, count, ds_rows, 1, keys + k0 * NR, T * NR, sum_q + q0 * ldk, ldk, true);
            }
        }
        for (Int t = 0; t < T; t++) {
            const Int row = (b * T + t) * H + h;
            std::memcpy(dq + row * K, sum_q + t * ldk, K * sizeof(float));
            std::memcpy(dk + row * K, sum_k + t * ldk, K * sizeof(float));
            std::memcpy(dv + row * V, sum_v + t * ldv, V * sizeof(float));
        }
    });
}

}  // extern "C"
