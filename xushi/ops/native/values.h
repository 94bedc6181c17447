// The element type of tensors and of products: float, or with XUSHI_BF16 bfloat16, multiplied in pairs and summed as
// floats.

#pragma once

#include "vectors.h"

#if XUSHI_BF16 && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// Value: an element of a tensor. Word: what one multiply-add reads of a factor per step along the depth, one float or
// two consecutive bfloat16 values, the first in the low half. Weights, their gradients and all sums are always floats.

#if XUSHI_BF16

struct Value {
    uint16_t half;  // the upper half of a float
};
struct Word {
    uint16_t low, high;
};
typedef uint16_t Halves __attribute__((vector_size(L * 2)));
constexpr Int PAIR = 2;

// L floats rounded to the nearest bfloat16, ties to even, in the upper half of each lane.
inline Bits upper(const float* p) {
    const Vec v = load(p);
    const Bits b = bits(v), nearest = b + 0x7FFF + ((b >> 16) & 1);
    return (v == v ? nearest : b | 0x400000) & 0xFFFF0000;  // rounding up could wrap a NaN around to a number
}
inline Bits upper(const Value* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, Bits) << 16;
}
inline Vec load(const Value* p) { return floats(upper(p)); }
inline float wide(float value) { return value; }
inline float wide(Value value) {
    const uint32_t b = static_cast<uint32_t>(value.half) << 16;
    float result;
    std::memcpy(&result, &b, sizeof b);
    return result;
}
inline Value narrow(float value) {
    uint32_t b;
    std::memcpy(&b, &value, sizeof b);
    b = value == value ? b + 0x7FFF + ((b >> 16) & 1) : b | 0x400000;
    return {static_cast<uint16_t>(b >> 16)};
}
inline void store(Value* p, Vec v) {
#ifdef __AVX512BF16__  // equal, except that numbers below 1e-38 become zero, as in this instruction set's products
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    float wide[L];
    store(wide, v);
    const Halves halves = __builtin_convertvector(upper(wide) >> 16, Halves);
#endif
    std::memcpy(p, &halves, sizeof halves);
}

inline Bits load_words(const Word* p) {
    Bits b;
    std::memcpy(&b, p, sizeof b);
    return b;
}
inline void store_words(Word* p, Bits b) { std::memcpy(p, &b, sizeof b); }
inline Bits all_words(const Word& word) {
    uint32_t both;
    std::memcpy(&both, &word, sizeof both);
    return both + Bits{};
}

// 2 L consecutive values as L words.
inline Bits pairs(const Value* p) { return load_words(reinterpret_cast<const Word*>(p)); }
inline Bits pairs(const float* p) {
#ifdef __AVX512BF16__
    return (Bits)_mm512_cvtne2ps_pbh((__m512)load(p + L), (__m512)load(p));
#else
    Value values[2 * L];
    store(values, load(p));
    store(values + L, load(p + L));
    return pairs(values);
#endif
}

// sum + the products of a's and b's pairs; the upper values are added first, as the instruction does.
inline Vec multiply_add(Bits a, Bits b, Vec sum) {
#ifdef __AVX512BF16__
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += floats(a & 0xFFFF0000) * floats(b & 0xFFFF0000);
    return sum + floats(a << 16) * floats(b << 16);
#endif
}

// L words with a value of `first` in the low half and one of `second` in the high half, or 0 if `second` is null.
template <class T>
inline Bits zipped(const T* first, const T* second) {
    const Bits low = upper(first) >> 16;
    return second == nullptr ? low : low | upper(second);
}
#ifdef __AVX512BF16__
template <>
inline Bits zipped(const float* first, const float* second) {
    const Vec above = second == nullptr ? Vec{} : load(second);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Bits)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)above, (__m512)load(first)));
}
#endif

// out[i] = the word with first[i] in the low half and second[i] in the high half, or 0 if `second` is null.
template <class T>
inline void zip(const T* first, const T* second, Int n, Word* out) {
    Int i = 0;
    for (; i + L <= n; i += L) store_words(out + i, zipped(first + i, second == nullptr ? nullptr : second + i));
    if (i < n) {
        T rows[2][L] = {};
        Word tail[L];
        std::memcpy(rows[0], first + i, (n - i) * sizeof(T));
        if (second != nullptr) std::memcpy(rows[1], second + i, (n - i) * sizeof(T));
        store_words(tail, zipped(rows[0], rows[1]));
        std::memcpy(out + i, tail, (n - i) * sizeof(Word));
    }
}

// A row of `depth` values as words: the row itself if it already has that layout, else a copy in `buffer`.
inline const Word* row_words(const float* row, Int depth, Word* buffer) {
    map(reinterpret_cast<Value*>(buffer), row, depth, [](Int, Vec v) { return v; });
    if (depth % 2) buffer[depth / 2].high = 0;
    return buffer;
}
inline const Word* row_words(const Value* row, Int depth, Word* buffer) {
    if (depth % 2 == 0) return reinterpret_cast<const Word*>(row);
    std::memcpy(buffer, row, depth * sizeof(Value));
    buffer[depth / 2].high = 0;
    return buffer;
}

#else

typedef float Value;
typedef float Word;
constexpr Int PAIR = 1;

inline float wide(Value value) { return value; }
inline Value narrow(float value) { return value; }
inline Vec load_words(const Word* p) { return load(p); }
inline Vec all_words(Word word) { return broadcast(word); }
inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
inline Bits pairs(const float* p) { return bits(load(p)); }
inline void store_words(Word* p, Bits b) { store(p, floats(b)); }
inline void zip(const float* first, const float*, Int n, Word* out) { std::memcpy(out, first, n * sizeof(Word)); }
inline const Word* row_words(const float* row, Int, Word*) { return row; }

#endif

inline Int words(Int depth) { return (depth + PAIR - 1) / PAIR; }  // that hold `depth` values

}  // namespace
