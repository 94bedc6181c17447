// Products in AMX tiles (XUSHI_TILES): registers of 16 rows of 16 words. One instruction multiplies two tiles; vectors
// need 256 instructions for it. Without AMX, loops replace the instructions, so that tests can run this file anywhere.

#pragma once

#include <type_traits>

#include "threads.h"

#if XUSHI_TILES

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#endif

namespace {

constexpr Int SIDE = 16, SQUARE = SIDE * SIDE;  // words of a row, and of a tile
static_assert(L == SIDE && PAIR == 2, "tiles take words of two bfloat16 values");

#if defined(__AMX_BF16__)

// Asks the system for the tile registers, which a process must request first. Returns whether they are granted.
inline bool granted() {
    constexpr int ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tiles) == 0;
}

// Configures the tile registers for as long as it lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { asm volatile("tilerelease"); }
};

// `apart`: the distance between rows, in words or floats (both have 4 bytes).
template <int tile>
inline void load_tile(const void* p, Int apart) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(p), "r"(apart * 4) : "memory");
}
template <int tile>
inline void store_tile(float* p, Int apart) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(p), "r"(apart * 4) : "memory");
}
template <int tile>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// sum [16, 16] += a [16, 16 words] b [16 words, 16].
template <int sum, int a, int b>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#else

inline bool granted() { return true; }

alignas(64) thread_local Word tiles[8][SIDE][SIDE];

struct Tiles {
    Tiles() { std::memset(tiles, 0xFF, sizeof tiles); }  // NaN, so that a tile read before it is written shows
};
template <int tile>
inline void load_tile(const void* p, Int apart) {
    for (Int i = 0; i < SIDE; i++) std::memcpy(tiles[tile][i], static_cast<const char*>(p) + i * apart * 4, 64);
}
template <int tile>
inline void store_tile(float* p, Int apart) {
    for (Int i = 0; i < SIDE; i++) std::memcpy(p + i * apart, tiles[tile][i], 64);
}
template <int tile>
inline void clear_tile() {
    std::memset(tiles[tile], 0, sizeof tiles[tile]);
}
template <int sum, int a, int b>
inline void multiply_tiles() {
    for (Int i = 0; i < SIDE; i++) {
        Vec total = floats(load_words(tiles[sum][i]));
        for (Int k = 0; k < SIDE; k++)
            total = multiply_add(all_words(tiles[a][i][k]), load_words(tiles[b][k]), total);
        store_words(tiles[sum][i], bits(total));
    }
}

#endif

inline Bits some_words(const Word* p, Int count) {  // followed by zeros
    Word tail[SIDE] = {};
    std::memcpy(tail, p, count * sizeof(Word));
    return load_words(tail);
}

// Copies the words (i, k) = a[i][k * step] into tiles [blocks of rows][blocks of depth][16][16]. Words past `depth`
// become zero; rows past the last are undefined. If step is not 1, the rows must be consecutive in memory and padded to
// whole tiles.
void into_tiles(Int m, Int depth, const Word* const* a, Int step, Word* out) {
    for (Int i0 = 0; i0 < m; i0 += SIDE) {
        const Int rows = std::min(SIDE, m - i0);
        for (Int k0 = 0; k0 < depth; k0 += SIDE, out += SQUARE) {
            const Int columns = depth - k0;
            Bits square[SIDE];
            if (step == 1) {
                for (Int i = 0; i < rows; i++) {
                    const Word* row = a[i0 + i] + k0;
                    store_words(out + i * SIDE, columns >= SIDE ? load_words(row) : some_words(row, columns));
                }
                continue;
            }
            const Word* first = a[i0] + k0 * step;
            if (columns >= SIDE) {
                for (Int k = 0; k < SIDE; k++) square[k] = load_words(first + k * step);
            } else {
                for (Int k = 0; k < SIDE; k++) square[k] = k < columns ? load_words(first + k * step) : Bits{};
            }
            transpose(square);
            for (Int i = 0; i < SIDE; i++) store_words(out + i * SIDE, square[i]);
        }
    }
}

// c [16 R, NR] (+)= a times a panel. a holds the tiles of R blocks of rows, `across` words apart; the panel's last 16
// steps of depth are at `last`.
template <int R>
inline void block(Int steps, const Word* a, Int across, const Word* panel, const Word* last, float* c, Int ldc,
                  bool add) {
    if (add) {
        load_tile<0>(c, ldc);
        load_tile<1>(c + SIDE, ldc);
        if (R > 1) load_tile<2>(c + SIDE * ldc, ldc);
        if (R > 1) load_tile<3>(c + SIDE * ldc + SIDE, ldc);
    } else {
        clear_tile<0>();
        clear_tile<1>();
        if (R > 1) clear_tile<2>();
        if (R > 1) clear_tile<3>();
    }
    for (Int s = 0; s < steps; s++, a += SQUARE, panel += SIDE * NR) {
        const Word* b = s + 1 < steps ? panel : last;
        for (Int k = 0; k < SIDE; k++) {  // the panel's next block
            __builtin_prefetch(panel + (SIDE + k) * NR);
            __builtin_prefetch(panel + (SIDE + k) * NR + SIDE);
        }
        load_tile<4>(a, SIDE);
        load_tile<6>(b, NR);
        load_tile<7>(b + SIDE, NR);
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        if (R == 1) continue;
        load_tile<5>(a + across, SIDE);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(c, ldc);
    store_tile<1>(c + SIDE, ldc);
    if (R > 1) store_tile<2>(c + SIDE * ldc, ldc);
    if (R > 1) store_tile<3>(c + SIDE * ldc + SIDE, ldc);
}

// multiply_words (products.h) in tiles.
template <class C>
void multiply_tiled(Int m, Int n, Int depth, const Word* const* a, Int step, const Word* packed, Int stride, C* c,
                    Int ldc, bool add) {
    const Int steps = (depth + SIDE - 1) / SIDE, across = steps * SQUARE;
    Word* left = local_tiles.take<Word>((m + SIDE - 1) / SIDE * across);
    into_tiles(m, depth, a, step, left);
    const Tiles there;
    alignas(64) Word end[SIDE * NR];
    alignas(64) float sums[2 * SIDE * NR];
    for (Int j = 0; j < n; j += NR, packed += stride) {
        const Int wide = std::min<Int>(NR, n - j), whole = (steps - 1) * SIDE;
        const Word* last = packed + whole * NR;
        if (depth % SIDE) {
            std::fill(end, end + SIDE * NR, Word{});
            std::memcpy(end, last, (depth - whole) * NR * sizeof(Word));
            last = end;
        }
        for (Int i = 0; i < m; i += 2 * SIDE) {
            const Int rows = std::min(2 * SIDE, m - i);
            const Word* tiles = left + i / SIDE * across;
            C* out = c + i * ldc + j;
            const auto into = [&](float* place, Int ld, bool on_top) {
                if (rows > SIDE) block<2>(steps, tiles, across, packed, last, place, ld, on_top);
                else block<1>(steps, tiles, across, packed, last, place, ld, on_top);
            };
            if constexpr (std::is_same_v<C, float>) {
                if (wide == NR && rows % SIDE == 0) {
                    into(out, ldc, add);
                    continue;
                }
            }
            into(sums, NR, false);
            for (Int r = 0; r < rows; r++, out += ldc) {
                for (Int v = 0; v < NR && v < wide; v += L) {
                    const Vec sum = load(sums + r * NR + v);
                    store_part(out + v, wide - v, add ? part(out + v, wide - v) + sum : sum);
                }
            }
        }
    }
}

}  // namespace

#endif
