// AMX: tiles of 16 x 64 bytes. A column of register tiles at a time, 32 x 32 sums in four tile
// registers. Compiled in the AVX-512 translation units, run where cpu::isa() says amx.
#pragma once
#include "cpu/panels.h"

#ifdef __AVX512F__
#define LOWP_AMX __attribute__((target("amx-tile,amx-int8,amx-bf16")))

namespace lowp {
namespace LOWP_ISA {

struct AmxFloat {  // bf16 pairs, fp32 sums
  static LOWP_AMX inline __attribute__((always_inline)) void step() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct AmxInt {  // int8 quads, int32 sums
  static LOWP_AMX inline __attribute__((always_inline)) void step() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
};

// All eight tile registers as 16 rows of 64 bytes. Static, because GCC believes that ldtilecfg
// reads 8 bytes only and would drop the writes to the rest of a local one.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static LOWP_AMX inline void amx_begin() { _tile_loadconfig(&kTileConfig); }

static LOWP_AMX inline void amx_end() { _tile_release(); }

// sums[rows][kCols] (+)= a [rows][units] * b [units][kCols], in squares of 32; rows of a beyond the
// last are multiplied too and their sums never read.
template <class Step>
static LOWP_AMX void amx_multiply_column(const float* a, const float* b, int rows, int units,
                                         bool first, float* sums) {
  constexpr int kRowBytes = kRowPad * 4, kColBytes = kCols * 4, kSumBytes = kBlockN * 4;
  for (int r = 0; r < rows; r += 32) {
    float* s = sums + r * kBlockN;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, s, kSumBytes);
      _tile_loadd(1, s + 16, kSumBytes);
      _tile_loadd(2, s + 16 * kBlockN, kSumBytes);
      _tile_loadd(3, s + 16 * kBlockN + 16, kSumBytes);
    }
    for (int u = 0; u < units; u += 16) {
      _tile_loadd(4, a + r * kRowPad + u, kRowBytes);
      _tile_loadd(5, a + (r + 16) * kRowPad + u, kRowBytes);
      _tile_loadd(6, b + u * kCols, kColBytes);
      _tile_loadd(7, b + u * kCols + 16, kColBytes);
      Step::step();
    }
    _tile_stored(0, s, kSumBytes);
    _tile_stored(1, s + 16, kSumBytes);
    _tile_stored(2, s + 16 * kBlockN, kSumBytes);
    _tile_stored(3, s + 16 * kBlockN + 16, kSumBytes);
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
#endif
