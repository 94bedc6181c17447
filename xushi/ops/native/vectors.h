// Vectors of XUSHI_LANES floats, block sizes for that width, e^x, and loops over rows of any length.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

typedef int64_t Int;

namespace {

constexpr int L = XUSHI_LANES;  // lanes: floats in a vector
// The register tile of a product: MR rows of NV vectors, NR columns.
#if XUSHI_LANES == 4
constexpr int MR = 6, NV = 4;  // 32 registers of 4 floats
#elif XUSHI_LANES == 8
constexpr int MR = 6, NV = 2;  // 16 registers of 8
#else
constexpr int MR = 8, NV = 2;  // 32 registers of 16; more rows would need more address registers than there are
#endif
constexpr int NR = NV * L;
constexpr Int ROWS = 96;       // rows of a task: with a panel of the other factor they fit the second-level cache
constexpr Int WIDTH = 16 * NR; // columns of a task
// Block sizes of attention.
#if XUSHI_TILES
constexpr Int QUERIES = 64;  // a multiple of 32, since tiles take two blocks of 16 rows at once
#else
constexpr Int QUERIES = 48;
#endif
constexpr Int KEYS = 64, FORWARD_KEYS = 512;  // multiples of NR for every width

typedef float Vec __attribute__((vector_size(L * 4)));
typedef float Loose __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(L * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Bits bits(Vec v) { return reinterpret_cast<Bits>(v); }
inline Vec floats(Bits b) { return reinterpret_cast<Vec>(b); }
inline Vec broadcast(float value) { return value - Vec{}; }  // x - 0 is x, also for -0, so compilers compute nothing
inline float sum_lanes(Vec v) {
    float sum = 0;
    for (int i = 0; i < L; i++) sum += v[i];
    return sum;
}

// Transposes L vectors of L words. Each step swaps blocks across the diagonal, half as large as in the step before.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define XUSHI_TRANSPOSES 1
template <int half, size_t... lane>
inline void swap_blocks(Bits& a, Bits& b, std::index_sequence<lane...>) {
    const Bits first = a, second = b;
    a = __builtin_shufflevector(first, second, (lane & half ? L + lane - half : lane)...);
    b = __builtin_shufflevector(first, second, (lane & half ? L + lane : lane + half)...);
}
template <int half = L / 2>
inline void transpose(Bits* rows) {
    for (int i = 0; i < L; i++)
        if (!(i & half)) swap_blocks<half>(rows[i], rows[i + half], std::make_index_sequence<L>());
    if constexpr (half > 1) transpose<half / 2>(rows);
}
#endif
#endif
#ifndef XUSHI_TRANSPOSES
inline void transpose(Bits* rows) {
    for (int i = 0; i < L; i++)
        for (int j = 0; j < i; j++) {
            const uint32_t value = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = value;
        }
}
#endif

// e^x within a few roundings. x is clamped to [-87, 88]; e^-87 is too small to change any sum computed here.
inline Vec exponential(Vec x) {
    x = x < broadcast(-87.0f) ? broadcast(-87.0f) : x;
    x = x > broadcast(88.0f) ? broadcast(88.0f) : x;
    const Vec shifted = x * broadcast(1.44269504f) + broadcast(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    const Vec n = shifted - broadcast(12582912.0f);
    const Vec r = (x - n * broadcast(0.693359375f)) - n * broadcast(-2.12194440e-4f);
    Vec p = broadcast(1.9875691500e-4f);  // Cephes' polynomial for e^r, |r| <= ln 2 / 2
    p = p * r + broadcast(1.3981999507e-3f);
    p = p * r + broadcast(8.3334519073e-3f);
    p = p * r + broadcast(4.1665795894e-2f);
    p = p * r + broadcast(1.6666665459e-1f);
    p = p * r + broadcast(5.0000001201e-1f);
    p = p * r * r + r + broadcast(1.0f);
    return floats(bits(p) + ((bits(shifted) - 0x4B400000) << 23));
}

template <class T>
inline Vec part(const T* p, Int left) {  // the first min(left, L) values, followed by zeros
    if (left >= L) return load(p);
    T tail[L] = {};
    if (left > 0) std::memcpy(tail, p, left * sizeof(T));
    return load(tail);
}

template <class T>
inline void store_part(T* p, Int left, Vec v) {
    if (left >= L) return store(p, v);
    T tail[L];
    store(tail, v);
    if (left > 0) std::memcpy(p, tail, left * sizeof(T));
}

// out[i..] = f(i, vector of in[i..]) over n values. The tail goes through a padded copy, so that every value is
// computed by the same code.
template <class O, class T, class F>
inline void map(O* out, const T* in, Int n, F f) {
    Int i = 0;
    for (; i + L <= n; i += L) store(out + i, f(i, load(in + i)));
    if (i < n) store_part(out + i, n - i, f(i, part(in + i, n - i)));
}

// The maximum of n >= 1 values.
inline float maximum(const float* row, Int n) {
    float largest = row[0];
    Int i = 0;
    if (n >= L) {
        Vec best = load(row);
        for (i = L; i + L <= n; i += L) {
            const Vec v = load(row + i);
            best = v > best ? v : best;
        }
        for (int j = 0; j < L; j++) largest = std::max(largest, best[j]);
    }
    for (; i < n; i++) largest = std::max(largest, row[i]);
    return largest;
}

// row <- e^(scale * row - top), n values; returns their sum.
inline float exponentials(float* row, Int n, float scale, float top) {
    map(row, row, n, [&](Int, Vec v) { return exponential(v * broadcast(scale) - broadcast(top)); });
    Vec sum = {};
    for (Int i = 0; i < n; i += L) sum += part(row + i, n - i);
    return sum_lanes(sum);
}

}  // namespace
