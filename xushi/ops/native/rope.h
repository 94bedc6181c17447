// The heads of latent attention: queries and keys assembled with their rotated parts, and the gradients of that.

#pragma once

#include "products.h"

namespace {

// Rotates R values in pairs: (x0, x1), (x2, x3), ... if interleaved, else (x_i, x_{i + R/2}). The result is laid out in
// halves: first values of all pairs, then second values.
inline void rotate(const Value* x, const float* cos, const float* sin, Value* out, Int R, bool interleaved) {
    const Int half = R / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (Int i = 0; i < half; i++) {
        const float a = wide(x[i * step]), b = wide(x[i * step + other]);
        out[i] = narrow(a * cos[i] - b * sin[i]);
        out[i + half] = narrow(b * cos[i] + a * sin[i]);
    }
}

// The gradient of `rotate`, from `d` in halves.
template <class T>
inline void rotate_back(const T* d, const float* cos, const float* sin, Value* out, Int R, bool interleaved) {
    const Int half = R / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (Int i = 0; i < half; i++) {
        const float a = wide(d[i]), b = wide(d[i + half]);
        out[i * step] = narrow(a * cos[i] + b * sin[i]);
        out[i * step + other] = narrow(b * cos[i] - a * sin[i]);
    }
}

}  // namespace

extern "C" {

// queries and keys [M, H, N + R], with their last R values rotated by the angles cos and sin [M, R / 2]. From q [M, H,
// N + R], keys and values kv [M, H, N + V], and k_rope [M, R], which all heads share and whose rows are `ld` values
// apart.
void xushi_heads(const Value* q, const Value* kv, const Value* k_rope, Int ld, const float* cos, const float* sin,
                 Value* queries, Value* keys, Int M, Int H, Int N, Int R, Int V, Int interleaved, Int threads) {
    pool().run(blocks(M, 32), threads, [&](Int task) {
        Value* turned = local_a.take<Value>(R);
        for (Int m = task * 32; m < std::min(M, task * 32 + 32); m++) {
            const float *c = cos + m * (R / 2), *s = sin + m * (R / 2);
            rotate(k_rope + m * ld, c, s, turned, R, interleaved);
            for (Int h = m * H; h < m * H + H; h++) {
                std::memcpy(queries + h * (N + R), q + h * (N + R), N * sizeof(Value));
                rotate(q + h * (N + R) + N, c, s, queries + h * (N + R) + N, R, interleaved);
                std::memcpy(keys + h * (N + R), kv + h * (N + V), N * sizeof(Value));
                std::memcpy(keys + h * (N + R) + N, turned, R * sizeof(Value));
            }
        }
    });
}

// Gradients of q, kv and k_rope, from those of queries, keys and values [M, H, V]. All tensors are contiguous.
void xushi_heads_backward(const Value* d_queries, const Value* d_keys, const Value* d_values, const float* cos,
                          const float* sin, Value* dq, Value* d_kv, Value* d_k_rope, Int M, Int H, Int N, Int R, Int V,
                          Int interleaved, Int threads) {
    pool().run(blocks(M, 32), threads, [&](Int task) {
        float* sum = local_a.take(R);
        for (Int m = task * 32; m < std::min(M, task * 32 + 32); m++) {
            const float *c = cos + m * (R / 2), *s = sin + m * (R / 2);
            std::fill(sum, sum + R, 0.0f);
            for (Int h = m * H; h < m * H + H; h++) {
                std::memcpy(dq + h * (N + R), d_queries + h * (N + R), N * sizeof(Value));
                rotate_back(d_queries + h * (N + R) + N, c, s, dq + h * (N + R) + N, R, interleaved);
                std::memcpy(d_kv + h * (N + V), d_keys + h * (N + R), N * sizeof(Value));
                std::memcpy(d_kv + h * (N + V) + N, d_values + h * V, V * sizeof(Value));
                for (Int i = 0; i < R; i++) sum[i] += wide(d_keys[h * (N + R) + N + i]);
            }
            rotate_back(sum, c, s, d_k_rope + m * R, R, interleaved);
        }
    });
}

}  // extern "C"
