// Panels of an operand in shared memory: where a value lies, and the sums of rows out of them. Host
// and device.
#pragma once
#include "cuda/vectors.h"

namespace lowp {
namespace cuda {

constexpr int kPanelRows = 128, kPanelBytes = 64;
constexpr int kPanelSize = kPanelRows * kPanelBytes;  // bytes of one operand in one stage

// Where 16-byte chunk `chunk` of a line of a panel lies. Lines are rows of 64 bytes along k, or,
// where the rows are adjacent in memory, steps along k of 256 bytes; the exclusive or keeps the
// eight lines that ldmatrix reads at once in different banks.
template <bool kAlongK>
LOWP_HD uint32_t chunk_offset(int line, int chunk) {
  if constexpr (kAlongK) return line * 64 + ((chunk ^ (line / 2 % 4)) * 16);
  return line * 256 + ((chunk ^ (line % 8)) * 16);
}

// The sum of one row in bias_grad's order: 64 values one after the other, then the sums of those.
// What a panel holds beyond the operand is +0, which changes no sum, for none is -0.
struct RowSum {
  static constexpr int kDepth = kPanelBytes / 2;  // values of a row in one panel
  static_assert(2 * kDepth == 64, "two panels make one group of the contract");
  float total, group;

  // The values of the row in panel k of an operand whose rows are adjacent in memory.
  LOWP_HD_MEMBER void add(const char* panel, int row, int64_t k, Float type) {
#pragma unroll 4
    for (int i = 0; i < kDepth; ++i) {
      const char* at = panel + chunk_offset<false>(i, row / 8) + row % 8 * 2;
      group = group + half_to_float(*reinterpret_cast<const uint16_t*>(at), type);
    }
    if (k % 2 == 1) {
      total = total + group;
      group = 0.0f;
    }
  }

  LOWP_HD_MEMBER float result() const { return total + group; }
};

}  // namespace cuda
}  // namespace lowp
