// Kernels of the training step, one source for every instruction set: vectors are the compiler's own vector types, as
// wide as XUSHI_LANES says (16 AVX-512, 8 AVX2, 4 NEON). Tensors are float32, or with XUSHI_BF16 bfloat16 (values.h),
// which with XUSHI_TILES are multiplied in AMX's tiles (tiles.h).
// Plain C ABI, no other library.
//
// Every result is bit-identical for any number of threads: work is cut into tasks by shape alone, each task writes its
// own part of the result, and sums run in a fixed order inside a task.
//
// Axes: N tokens, D hidden, K what a product sums over, E experts, F expert width, P rows sorted by expert, V vocabulary;
// B batch, H heads, T positions.

#include "attention.h"
#include "experts.h"
#include "loss.h"
#include "newton_schulz.h"
#include "rope.h"

extern "C" int xushi_lanes() { return L; }

// Whether the system lets this process use what the kernels were compiled for; asks for it.
extern "C" int xushi_granted() {
#if XUSHI_TILES
    return granted();
#else
    return 1;
#endif
}
