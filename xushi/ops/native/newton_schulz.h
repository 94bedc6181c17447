// Muon's Newton-Schulz iterations on many matrices.

#pragma once

#include "products.h"

namespace {

// x [rows, columns], rows <= columns, in place: x <- a x + (b G + c G G) x with G = x x^T, `steps` times.
void orthogonalise(float* x, Int rows, Int columns, float a, float b, float c, Int steps, Int threads) {
    float* gram = shared_rows.take(2 * rows * rows + rows * columns);
    float *square = gram + rows * rows, *product_ = square + rows * rows;
    for (Int step = 0; step < steps; step++) {
        product(x, x, gram, rows, rows, columns, true, threads);
        product(gram, gram, square, rows, rows, rows, true, threads);  // G is its own transpose
        map(square, square, rows * rows, [&](Int i, Vec v) {
            return broadcast(c) * v + broadcast(b) * part(gram + i, rows * rows - i);
        });
        product(square, x, product_, rows, columns, rows, false, threads);
        map(x, x, rows * columns, [&](Int i, Vec v) {
            return broadcast(a) * v + part(product_ + i, rows * columns - i);
        });
    }
}

}  // namespace

extern "C" {

// x [n, rows, columns] in place. Needs rows <= columns, and each matrix with a norm of at most 1.
void xushi_newton_schulz(float* x, Int n, Int rows, Int columns, float a, float b, float c, Int steps, Int threads) {
    if (n == 1) return orthogonalise(x, rows, columns, a, b, c, steps, threads);
    pool().run(n, threads, [&](Int i) { orthogonalise(x + i * rows * columns, rows, columns, a, b, c, steps, 1); });
}

}  // extern "C"
