// Matrix products and weight gradients. One factor is packed into panels of NR columns; the other is read in place.

#pragma once

#include "tiles.h"

namespace {

constexpr Int TOKENS = 256 * PAIR;  // that a weight gradient packs at a time

inline Int panels(Int n) { return (n + NR - 1) / NR; }
inline Int blocks(Int n, Int size) { return (n + size - 1) / size; }

// Packs one panel [words(depth)][NR] of a factor whose element (k, n) is row(k)[n].
template <class B>
void pack_rows(B row, Int depth, Int n, Word* panel) {
    n = std::min<Int>(n, NR);
    for (Int k = 0; k < depth; k += PAIR, panel += NR) {
        zip(row(k), k + 1 < depth ? row(k + 1) : nullptr, n, panel);
        std::fill(panel + n, panel + NR, Word{});
    }
}

// As pack_rows, for a factor whose element (k, n) is b[n * ld + k].
template <class T>
void pack_columns(const T* b, Int ld, Int depth, Int n, Word* panel) {
    Int k0 = 0;
#ifdef XUSHI_TRANSPOSES
    for (; n >= NR && k0 + L * PAIR <= depth; k0 += L * PAIR, panel += L * NR) {
        for (int i = 0; i < NR; i += L) {
            Bits square[L];
            for (int r = 0; r < L; r++) square[r] = pairs(b + (i + r) * ld + k0);
            transpose(square);
            for (int r = 0; r < L; r++) store_words(panel + r * NR + i, square[r]);
        }
    }
#endif
    constexpr Int block = 16;  // steps of k, few enough that the written words stay in the first-level cache
    for (; k0 < depth; k0 += block, panel += block / PAIR * NR) {
        const Int count = std::min(block, depth - k0);
        for (int i = 0; i < NR; i++) {
            Word buffer[block] = {};
            const Word* row = i < n ? row_words(b + i * ld + k0, count, buffer) : buffer;
            for (Int k = 0; k < words(count); k++) panel[k * NR + i] = row[k];
        }
    }
}

// c[i][0..n) (+)= sum over k of a[i][k * step] * panel[k][0..n), for R rows.
template <int R, class C>
inline void tile(Int depth, const Word* const* a, Int step, const Word* panel, C* c, Int ldc, Int n, bool add) {
    Vec sum[R][NV];
    const Word* rows[R];
    for (int i = 0; i < R; i++) rows[i] = a[i];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < NV; v++) sum[i][v] = Vec{};
    for (Int k = 0, at = 0; k < depth; k++, at += step, panel += NR) {
        decltype(load_words(panel)) b[NV];
        for (int v = 0; v < NV; v++) b[v] = load_words(panel + v * L);
        for (int i = 0; i < R; i++) {
            const auto value = all_words(rows[i][at]);
            for (int v = 0; v < NV; v++) sum[i][v] = multiply_add(value, b[v], sum[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++, c += ldc) {
        for (int v = 0; v < NV; v++) {
            const Int left = n - v * L;
            if (left > 0) store_part(c + v * L, left, add ? part(c + v * L, left) + sum[i][v] : sum[i][v]);
        }
    }
}

// c [m, n] (+)= a times the panels at `packed`, which are `stride` words apart; a's word (i, k) is a[i][k * step].
template <class C>
void multiply_words(Int m, Int n, Int depth, const Word* const* a, Int step, const Word* packed, Int stride, C* c,
                    Int ldc, bool add) {
#if XUSHI_TILES
    return multiply_tiled(m, n, depth, a, step, packed, stride, c, ldc, add);
#endif
    for (Int j = 0; j < n; j += NR, packed += stride) {
        const Int wide = std::min<Int>(NR, n - j);
        for (Int i = 0; i < m; i += MR) {
            C* out = c + i * ldc + j;
            switch (std::min<Int>(MR, m - i)) {
                case 1: tile<1>(depth, a + i, step, packed, out, ldc, wide, add); break;
                case 2: tile<2>(depth, a + i, step, packed, out, ldc, wide, add); break;
                case 3: tile<3>(depth, a + i, step, packed, out, ldc, wide, add); break;
                case 4: tile<4>(depth, a + i, step, packed, out, ldc, wide, add); break;
                case 5: tile<5>(depth, a + i, step, packed, out, ldc, wide, add); break;
#if XUSHI_LANES == 16
                case 6: tile<6>(depth, a + i, step, packed, out, ldc, wide, add); break;
                case 7: tile<7>(depth, a + i, step, packed, out, ldc, wide, add); break;
#endif
                default: tile<MR>(depth, a + i, step, packed, out, ldc, wide, add);
            }
        }
    }
}

// As multiply_words, for at most ROWS rows a[i] of `depth` values.
template <class T, class C>
void multiply(Int m, Int n, Int depth, const T* const* a, const Word* packed, Int stride, C* c, Int ldc, bool add) {
    Word* buffer = PAIR == 1 ? nullptr : local_words.take<Word>(m * words(depth));
    const Word* rows[ROWS] = {};
    for (Int i = 0; i < m; i++) rows[i] = row_words(a[i], depth, buffer + i * words(depth));
    multiply_words(m, n, words(depth), rows, 1, packed, stride, c, ldc, add);
}

// As multiply_words, for at most ROWS rows whose element (i, k) is column(k)[i].
template <class A>
void multiply_transposed(Int m, Int n, Int depth, A column, const Word* packed, Int stride, float* c, Int ldc,
                         bool add) {
    Word* left = local_words.take<Word>(words(depth) * ROWS);
    const Word* rows[ROWS] = {};
    for (Int k = 0; k < depth; k += PAIR)
        zip(column(k), k + 1 < depth ? column(k + 1) : nullptr, m, left + k / PAIR * ROWS);
    for (Int i = 0; i < m; i++) rows[i] = left + i;
    multiply_words(m, n, words(depth), rows, ROWS, packed, stride, c, ldc, add);
}

// Packs a whole factor, [n, depth] if `columns`, else [depth, n].
void pack_matrix(const float* b, Int depth, Int n, bool columns, Int threads, Word* packed) {
    pool().run(panels(n), threads, [&](Int p) {
        const Int j = p * NR;
        Word* panel = packed + p * words(depth) * NR;
        if (columns) pack_columns(b + j * depth, depth, depth, n - j, panel);
        else pack_rows([&](Int k) { return b + k * n + j; }, depth, n - j, panel);
    });
}

// Packs the [depth, n] block of rows b(m0), b(m0 + 1), ... that begins at column j0.
template <class B>
void pack_block(B b, Int m0, Int depth, Int j0, Int n, Word* packed) {
    for (Int j = 0; j < n; j += NR, packed += words(depth) * NR)
        pack_rows([&](Int k) { return b(m0 + k) + j0 + j; }, depth, n - j, packed);
}

// A weight's gradient in one thread: c[i][j] = sum over m of a(m)[i] * b(m)[j], for c [n_a, n_b].
template <class A, class B>
void outer(Int m, Int n_a, Int n_b, A a, B b, float* c) {
    Word* right = local_b.take<Word>(words(TOKENS) * WIDTH);
    if (m == 0) std::fill(c, c + n_a * n_b, 0.0f);
    for (Int m0 = 0; m0 < m; m0 += TOKENS) {
        const Int depth = std::min(TOKENS, m - m0);
        for (Int j0 = 0; j0 < n_b; j0 += WIDTH) {
            const Int n = std::min(WIDTH, n_b - j0);
            pack_block(b, m0, depth, j0, n, right);
            for (Int i0 = 0; i0 < n_a; i0 += ROWS)
                multiply_transposed(std::min(ROWS, n_a - i0), n, depth, [&](Int k) { return a(m0 + k) + i0; }, right,
                                    words(depth) * NR, c + i0 * n_b + j0, n_b, m0 > 0);
        }
    }
}

// The same by all threads, for matrices a [m, n_a] and b [m, n_b]. With `add`, the gradient is added to c.
template <class A>
void outer_all(Int m, Int n_a, Int n_b, const A* a, const Value* b, float* c, bool add, Int threads) {
    const Int wide = panels(n_b) * NR, few = MR * 8, across = blocks(n_b, WIDTH);
    Word* packed = shared_more.take<Word>(words(m) * wide);
    pool().run(blocks(m, TOKENS), threads, [&](Int task) {
        const Int m0 = task * TOKENS;
        pack_block([&](Int r) { return b + r * n_b; }, m0, std::min(TOKENS, m - m0), 0, n_b, packed + words(m0) * wide);
    });
    pool().run(blocks(n_a, few) * across, threads, [&](Int task) {
        const Int i0 = task / across * few, j0 = task % across * WIDTH;
        for (Int m0 = 0; m0 < m; m0 += TOKENS) {
            const Int depth = std::min(TOKENS, m - m0);
            multiply_transposed(std::min(few, n_a - i0), std::min(WIDTH, n_b - j0), depth,
                                [&](Int k) { return a + (m0 + k) * n_a + i0; },
                                packed + words(m0) * wide + j0 * words(depth), words(depth) * NR, c + i0 * n_b + j0,
                                n_b, add || m0 > 0);
        }
    });
}

// y [m, n] = x [m, depth] times w, which is [n, depth] if `columns`, else [depth, n].
template <class T>
void product(const T* x, const float* w, T* y, Int m, Int n, Int depth, bool columns, Int threads) {
    Word* packed = shared_packed.take<Word>(panels(n) * NR * words(depth));
    pack_matrix(w, depth, n, columns, threads, packed);
    const Int across = blocks(n, WIDTH);
    pool().run(blocks(m, ROWS) * across, threads, [&](Int task) {
        const Int i0 = task / across * ROWS, j0 = task % across * WIDTH, rows = std::min(ROWS, m - i0);
        const T* a[ROWS] = {};
        for (Int i = 0; i < rows; i++) a[i] = x + (i0 + i) * depth;
        multiply(rows, std::min(WIDTH, n - j0), depth, a, packed + j0 * words(depth), words(depth) * NR,
                 y + i0 * n + j0, n, false);
    });
}

}  // namespace

extern "C" {

// y [m, n] = x [m, k] w^T, w [n, k].
void xushi_linear(const Value* x, const float* w, Value* y, Int m, Int n, Int k, Int threads) {
    product(x, w, y, m, n, k, true, threads);
}

// dx [m, k] = dy [m, n] w.
void xushi_linear_input(const Value* dy, const float* w, Value* dx, Int m, Int n, Int k, Int threads) {
    product(dy, w, dx, m, k, n, false, threads);
}

// dw [n, k] = dy^T x.
void xushi_linear_weight(const Value* dy, const Value* x, float* dw, Int m, Int n, Int k, Int threads) {
    outer_all(m, n, k, dy, x, dw, false, threads);
}

}  // extern "C"
