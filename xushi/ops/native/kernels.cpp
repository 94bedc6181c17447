// Kernels of the training step. One source serves every instruction set: it uses the compiler's vector types, of
// XUSHI_LANES floats (16 for AVX-512, 8 for AVX2, 4 for NEON). Tensors are float32, or bfloat16 with XUSHI_BF16
// (values.h). With XUSHI_TILES, bfloat16 products run in AMX tiles (tiles.h).
//
// The headers hold definitions; this file is the only one that includes them, and the only one that is compiled. The
// ABI is plain C, and no other library is used.
//
// Results are bit-identical for any number of threads: tasks depend on the shapes only, each task writes its own part
// of the result, and every sum inside a task has a fixed order.
//
// Axes: N tokens, D hidden, K depth of a product (the axis it sums over), E experts, F expert width, P rows sorted by
// expert, V vocabulary; B batch, H heads, T positions.

#include "attention.h"
#include "experts.h"
#include "loss.h"
#include "newton_schulz.h"
#include "rope.h"

extern "C" int xushi_lanes() { return L; }

// Asks the system for the registers that the kernels were compiled for. Returns whether it grants them.
extern "C" int xushi_granted() {
#if XUSHI_TILES
    return granted();
#else
    return 1;
#endif
}
