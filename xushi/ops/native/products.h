// Matrix products: one factor packed into panels of NR columns, the other read where it lies; and weight gradients.

#pragma once

#include "threads.h"

namespace {

inline Int panels(Int n) { return (n + NR - 1) / NR; }
inline Int blocks(Int n, Int size) { return (n + size - 1) / size; }

// One panel [depth][NR] of a factor with element (k, n) at b[k * ld + n].
void pack_rows(const float* b, Int ld, Int depth, Int n, float* panel) {
    for (Int k = 0; k < depth; k++, b += ld, panel += NR) {
        if (n >= NR) {
            for (int v = 0; v < NV; v++) store(panel + v * L, load(b + v * L));
        } else {
            for (int i = 0; i < NR; i++) panel[i] = i < n ? b[i] : 0.0f;
        }
    }
}

// The same with element (k, n) at b[n * ld + k].
void pack_columns(const float* b, Int ld, Int depth, Int n, float* panel) {
    constexpr Int block = 16;  // of k, so that what is written stays in the first-level cache
    for (Int k0 = 0; k0 < depth; k0 += block) {
        const Int k1 = std::min(k0 + block, depth);
        for (int i = 0; i < NR; i++) {
            if (i < n) {
                for (Int k = k0; k < k1; k++) panel[k * NR + i] = b[i * ld + k];
            } else {
                for (Int k = k0; k < k1; k++) panel[k * NR + i] = 0.0f;
            }
        }
    }
}

// c[i][0..n) (+)= sum over k of a[i][k * step] * panel[k][0..n), for R rows.
template <int R>
inline void tile(Int depth, const float* const* a, Int step, const float* panel, float* c, Int ldc, Int n, bool add) {
    Vec sum[R][NV];
    const float* rows[R];
    for (int i = 0; i < R; i++) rows[i] = a[i];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < NV; v++) sum[i][v] = Vec{};
    for (Int k = 0, at = 0; k < depth; k++, at += step, panel += NR) {
        Vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = load(panel + v * L);
        for (int i = 0; i < R; i++) {
            const Vec value = all(rows[i][at]);
            for (int v = 0; v < NV; v++) sum[i][v] += value * b[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++, c += ldc) {
        if (n >= NR) {
            for (int v = 0; v < NV; v++) store(c + v * L, add ? load(c + v * L) + sum[i][v] : sum[i][v]);
        } else {
            float row[NR];
            for (int v = 0; v < NV; v++) store(row + v * L, sum[i][v]);
            for (int j = 0; j < n; j++) c[j] = add ? c[j] + row[j] : row[j];
        }
    }
}

// c [m, n] (+)= a times panels, of which one lies `stride` behind the other; a's element (i, k) is a[i][k * step].
void multiply(Int m, Int n, Int depth, const float* const* a, Int step, const float* packed, Int stride, float* c,
              Int ldc, bool add) {
    for (Int j = 0; j < n; j += NR, packed += stride) {
        const Int wide = std::min<Int>(NR, n - j);
        for (Int i = 0; i < m; i += MR) {
            float* out = c + i * ldc + j;
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

// The same for at most ROWS rows with a's element (i, k) at a[k * step + i].
void multiply_transposed(Int m, Int n, Int depth, const float* a, Int step, const float* packed, Int stride, float* c,
                         Int ldc, bool add) {
    const float* columns[ROWS] = {};
    for (Int i = 0; i < m; i++) columns[i] = a + i;
    multiply(m, n, depth, columns, step, packed, stride, c, ldc, add);
}

// A factor [n, depth] (columns) or [depth, n] packed whole.
void pack_matrix(const float* b, Int depth, Int n, bool columns, Int threads, float* packed) {
    pool().run(panels(n), threads, [&](Int p) {
        const Int j = p * NR;
        if (columns) pack_columns(b + j * depth, depth, depth, n - j, packed + p * depth * NR);
        else pack_rows(b + j, n, depth, n - j, packed + p * depth * NR);
    });
}

// The [depth, n] part of rows b(m0), b(m0 + 1), ... from column j0 on, as panels.
template <class B>
void pack_block(B b, Int m0, Int depth, Int j0, Int n, float* packed) {
    for (Int j = 0; j < n; j += NR, packed += depth * NR)
        for (Int k = 0; k < depth; k++) pack_rows(b(m0 + k) + j0 + j, 0, 1, n - j, packed + k * NR);
}

// c[i0 .. i0 + rows][j0 .. j0 + n) (+)= sum over k < depth of a(m0 + k)[i] * packed[k][j]; c has rows of `ldc`.
template <class A>
void outer_block(A a, Int m0, Int depth, Int i0, Int rows, Int n, const float* packed, float* c, Int ldc, bool add) {
    float* left = local_a.take(DEPTH * ROWS);
    for (Int k = 0; k < depth; k++) std::memcpy(left + k * ROWS, a(m0 + k) + i0, rows * sizeof(float));
    multiply_transposed(rows, n, depth, left, ROWS, packed, depth * NR, c, ldc, add);
}

// c [n_a, n_b] = sum over m of a(m)[i] * b(m)[j]: a weight's gradient, in one thread.
template <class A, class B>
void outer(Int m, Int n_a, Int n_b, A a, B b, float* c) {
    float* right = local_b.take(DEPTH * WIDTH);
    if (m == 0) std::fill(c, c + n_a * n_b, 0.0f);
    for (Int m0 = 0; m0 < m; m0 += DEPTH) {
        const Int depth = std::min(DEPTH, m - m0);
        for (Int j0 = 0; j0 < n_b; j0 += WIDTH) {
            const Int n = std::min(WIDTH, n_b - j0);
            pack_block(b, m0, depth, j0, n, right);
            for (Int i0 = 0; i0 < n_a; i0 += ROWS)
                outer_block(a, m0, depth, i0, std::min(ROWS, n_a - i0), n, right, c + i0 * n_b + j0, n_b, m0 > 0);
        }
    }
}

// The same by all threads for rows that lie n_a and n_b apart, with `add` on top of what c holds.
void outer_all(Int m, Int n_a, Int n_b, const float* a, const float* b, float* c, bool add, Int threads) {
    const Int wide = panels(n_b) * NR, few = MR * 8, across = blocks(n_b, WIDTH);
    float* packed = shared_more.take(m * wide);
    pool().run(blocks(m, DEPTH), threads, [&](Int task) {
        const Int m0 = task * DEPTH;
        pack_block([&](Int r) { return b + r * n_b; }, m0, std::min(DEPTH, m - m0), 0, n_b, packed + m0 * wide);
    });
    pool().run(blocks(n_a, few) * across, threads, [&](Int task) {
        const Int i0 = task / across * few, j0 = task % across * WIDTH;
        for (Int m0 = 0; m0 < m; m0 += DEPTH) {
            const Int depth = std::min(DEPTH, m - m0);
            outer_block([&](Int r) { return a + r * n_a; }, m0, depth, i0, std::min(few, n_a - i0),
                        std::min(WIDTH, n_b - j0), packed + m0 * wide + j0 * depth, c + i0 * n_b + j0, n_b,
                        add || m0 > 0);
        }
    });
}

void product(const float* x, const float* w, float* y, Int m, Int n, Int depth, bool columns, Int threads) {
    float* packed = shared_packed.take(panels(n) * NR * depth);
    pack_matrix(w, depth, n, columns, threads, packed);
    const Int across = blocks(n, WIDTH);
    pool().run(blocks(m, ROWS) * across, threads, [&](Int task) {
        const Int i0 = task / across * ROWS, j0 = task % across * WIDTH, rows = std::min(ROWS, m - i0);
        const float* a[ROWS] = {};
        for (Int i = 0; i < rows; i++) a[i] = x + (i0 + i) * depth;
        multiply(rows, std::min(WIDTH, n - j0), depth, a, 1, packed + j0 * depth, depth * NR, y + i0 * n + j0, n,
                 false);
    });
}

}  // namespace

extern "C" {

// y [m, n] = x [m, k] w^T, w [n, k].
void xushi_linear(const float* x, const float* w, float* y, Int m, Int n, Int k, Int threads) {
    product(x, w, y, m, n, k, true, threads);
}

// dx [m, k] = dy [m, n] w.
void xushi_linear_input(const float* dy, const float* w, float* dx, Int m, Int n, Int k, Int threads) {
    product(dy, w, dx, m, k, n, false, threads);
}

// dw [n, k] = dy^T x.
void xushi_linear_weight(const float* dy, const float* x, float* dw, Int m, Int n, Int k, Int threads) {
    outer_all(m, n, k, dy, x, dw, false, threads);
}

}  // extern "C"
