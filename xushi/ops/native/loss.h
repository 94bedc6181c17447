// The output head with its loss and both gradients, in chunks of tokens.

#pragma once

#include "products.h"

extern "C" {

// losses [N] = -log softmax(x head^T)[target] for x [N, D] and head [V, D]; dx [N, D] and d_head [V, D] are the
// gradients of sum_n weight_n * loss_n. If `weights` is null, only the losses are computed.
void xushi_cross_entropy(const Value* x, const float* head, const Int* targets, const float* weights, float* losses,
                         Value* dx, float* d_head, Int N, Int D, Int V, Int threads) {
    const Int chunk = std::min(N, std::max(ROWS, (Int{1} << 22) / V / ROWS * ROWS));
    const Int columns_size = panels(V) * NR * words(D), size = columns_size + panels(D) * NR * words(V);
    Word* packed = shared_packed.take<Word>(size);
    pack_matrix(head, D, V, true, threads, packed);
    if (weights != nullptr) pack_matrix(head, V, D, false, threads, packed + columns_size);
    float* logits = shared_rows.take(chunk * V);
    const Int few = MR * 8;  // rows of logits per task: more rows read the head less often but do not stay in the cache
    for (Int n0 = 0; n0 < N; n0 += chunk) {
        const Int count = std::min(chunk, N - n0);
        pool().run(blocks(count, few), threads, [&](Int task) {
            const Int i0 = task * few, m = std::min(few, count - i0);
            const Value* a[ROWS] = {};
            const float* d[ROWS] = {};
            for (Int i = 0; i < m; i++) {
                a[i] = x + (n0 + i0 + i) * D;
                d[i] = logits + (i0 + i) * V;
            }
            multiply(m, V, D, a, packed, words(D) * NR, logits + i0 * V, V, false);
            for (Int i = 0; i < m; i++) {
                const Int n = n0 + i0 + i;
                float* row = logits + (i0 + i) * V;
                const float top = maximum(row, V), chosen = row[targets[n]], norm = exponentials(row, V, 1.0f, top);
                losses[n] = top + std::log(norm) - chosen;
                if (weights == nullptr) continue;
                map(row, row, V, [&](Int, Vec v) { return v * broadcast(weights[n] / norm); });
                row[targets[n]] -= weights[n];
            }
            if (weights == nullptr) return;
            multiply(m, D, V, d, packed + columns_size, words(V) * NR, dx + (n0 + i0) * D, D, false);
        });
        if (weights != nullptr) outer_all(count, V, D, logits, x + n0 * D, d_head, n0 > 0, threads);
    }
}

}  // extern "C"
