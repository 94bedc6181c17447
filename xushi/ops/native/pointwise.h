// SwiGLU, RMS norm and AdamW, which are limited by memory bandwidth.

#pragma once

#include "threads.h"

namespace {

struct Gated {  // gate and up after the clamp, and the clamp's slope for each: 0 if clamped, else 1
    Vec gate, up, gate_slope, up_slope;
};

inline Gated gated(Vec gate, Vec up, float limit) {
    Gated g{gate, up, broadcast(1.0f), broadcast(1.0f)};
    if (limit > 0) {
        const Vec high = broadcast(limit), low = broadcast(-limit);
        g.gate_slope = gate > high ? broadcast(0.0f) : broadcast(1.0f);
        g.up_slope = (up > high) | (up < low) ? broadcast(0.0f) : broadcast(1.0f);
        g.gate = gate > high ? high : gate;
        g.up = up > high ? high : (up < low ? low : up);
    }
    return g;
}

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

// a = silu(gate) * up
void swiglu(const Value* gate, const Value* up, Value* a, Int width, float limit) {
    map(a, gate, width, [&](Int i, Vec g) {
        const Gated x = gated(g, part(up + i, width - i), limit);
        return x.gate * sigmoid(x.gate) * x.up;
    });
}

// d_gate and d_up for the gradient scale * da of silu(gate) * up. `a` receives scale * silu(gate) * up. Returns the sum
// of da * silu(gate) * up, which is the gradient of `scale`.
template <class T>
float swiglu_backward(const Value* gate, const Value* up, const T* da, float scale, Value* a, Value* d_gate,
                      Value* d_up, Int width, float limit) {
    Vec sum = {};
    for (Int i = 0; i < width; i += L) {
        const Int left = width - i;
        const Gated x = gated(part(gate + i, left), part(up + i, left), limit);
        const Vec s = sigmoid(x.gate), silu = x.gate * s, d = part(da + i, left), scaled = d * broadcast(scale);
        const Vec value = silu * x.up;
        sum += d * value;
        store_part(a + i, left, value * broadcast(scale));
        store_part(d_gate + i, left,
                   scaled * x.up * (s * (broadcast(1.0f) + x.gate * (broadcast(1.0f) - s))) * x.gate_slope);
        store_part(d_up + i, left, scaled * silu * x.up_slope);
    }
    return sum_lanes(sum);
}

}  // namespace

extern "C" {

// a = silu(gate) * up, all [rows, width]. limit 0: no clamp.
void xushi_swiglu(const Value* gate, const Value* up, Value* a, Int rows, Int width, float limit, Int threads) {
    pool().run(blocks(rows, 64), threads, [&](Int task) {
        for (Int r = task * 64; r < std::min(rows, task * 64 + 64); r++)
            swiglu(gate + r * width, up + r * width, a + r * width, width, limit);
    });
}

void xushi_swiglu_backward(const Value* gate, const Value* up, const Value* da, Value* d_gate, Value* d_up, Int rows,
                           Int width, float limit, Int threads) {
    pool().run(blocks(rows, 64), threads, [&](Int task) {
        Value* unused = local_a.take<Value>(width);
        for (Int r = task * 64; r < std::min(rows, task * 64 + 64); r++)
            swiglu_backward(gate + r * width, up + r * width, da + r * width, 1.0f, unused, d_gate + r * width,
                            d_up + r * width, width, limit);
    });
}

// y = x / rms(x) * weight over rows of `width`; `rstd` [rows] receives 1 / rms(x) for the backward pass.
void xushi_rms_norm(const Value* x, const float* weight, Value* y, float* rstd, Int rows, Int width, float eps,
                    Int threads) {
    pool().run(blocks(rows, 64), threads, [&](Int task) {
        for (Int r = task * 64; r < std::min(rows, task * 64 + 64); r++) {
            const Value* row = x + r * width;
            Vec sum = {};
            for (Int i = 0; i < width; i += L) {
                const Vec v = part(row + i, width - i);
                sum += v * v;
            }
            const float scale = 1.0f / std::sqrt(sum_lanes(sum) / width + eps);
            rstd[r] = scale;
            map(y + r * width, row, width, [&](Int i, Vec v) {
                return part(weight + i, width - i) * (v * broadcast(scale));
            });
        }
    });
}

// dx = rstd * (dy w - xhat * mean(dy w xhat)), with xhat = x * rstd; d_weight [width] = sum over rows of dy * xhat,
// summed in groups of rows that depend on the shape only.
void xushi_rms_norm_backward(const Value* x, const float* weight, const float* rstd, const Value* dy, Value* dx,
                             float* d_weight, Int rows, Int width, Int threads) {
    const Int group = std::max<Int>(64, blocks(rows, 32)), groups = blocks(rows, group);
    float* partial = shared_rows.take(groups * width);
    pool().run(groups, threads, [&](Int task) {
        float* sums = partial + task * width;
        std::fill(sums, sums + width, 0.0f);
        for (Int r = task * group; r < std::min(rows, (task + 1) * group); r++) {
            const Value *row = x + r * width, *d = dy + r * width;
            const float scale = rstd[r];
            Vec dot = {};
            for (Int i = 0; i < width; i += L) {
                const Int left = width - i;
                dot += part(d + i, left) * part(weight + i, left) * part(row + i, left);
            }
            const float mean = sum_lanes(dot) * scale * scale / width;
            map(dx + r * width, d, width, [&](Int i, Vec v) {
                const Int left = width - i;
                return broadcast(scale) * (v * part(weight + i, left) - part(row + i, left) * broadcast(mean));
            });
            map(sums, sums, width, [&](Int i, Vec v) {
                return v + part(d + i, width - i) * part(row + i, width - i) * broadcast(scale);
            });
        }
    });
    for (Int i = 0; i < width; i++) {
        float sum = 0;
        for (Int g = 0; g < groups; g++) sum += partial[g * width + i];
        d_weight[i] = sum;
    }
}

// One AdamW update in place. rate: learning rate / (1 - beta1^t); correction2: sqrt(1 - beta2^t); decay: learning rate
// * weight decay.
void xushi_adamw(float* parameter, const float* gradient, float* mean, float* square, Int count, float rate,
                 float beta1, float beta2, float correction2, float eps, float decay, Int threads) {
    constexpr Int size = 1 << 16;
    pool().run(blocks(count, size), threads, [&](Int task) {
        const Int begin = task * size, end = std::min(count, begin + size);
        // Unless told that these arrays do not overlap, GCC does not vectorise the loop, and it takes three times as
        // long.
#pragma GCC ivdep
        for (Int i = begin; i < end; i++) {
            const float g = gradient[i];
            mean[i] += (1 - beta1) * (g - mean[i]);
            square[i] = beta2 * square[i] + (1 - beta2) * g * g;
            parameter[i] = parameter[i] * (1 - decay) - rate * mean[i] / (std::sqrt(square[i]) / correction2 + eps);
        }
    });
}

}  // extern "C"
