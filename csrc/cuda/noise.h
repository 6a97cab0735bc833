// The draws of runs of elements: one Philox call serves eight.
#pragma once
#include "numerics/philox.h"

namespace lowp {
namespace cuda {

// all[i] = all[i + kCount] where that bit of skip is set
template <int kCount, int kAll>
LOWP_HD void drop_first(uint32_t skip, uint32_t* all) {
#pragma unroll
  for (int i = 0; i < kAll - kCount; ++i) all[i] = (skip & kCount) ? all[i + kCount] : all[i];
}

// Draws of the kSize elements from the global index `element` on; kSize is a multiple of 8.
template <int kSize>
LOWP_HD void fill_draws(const PhiloxKey& key, uint64_t element, uint32_t* draws) {
  const uint64_t group = element / kDrawsPerCall;
  const uint32_t skip = static_cast<uint32_t>(element % kDrawsPerCall);
  if (skip == 0) {
#pragma unroll
    for (int c = 0; c < kSize / kDrawsPerCall; ++c) {
      uint32_t w[4];
      philox_group(key, group + c, w);
#pragma unroll
      for (int i = 0; i < kDrawsPerCall; ++i) {
        draws[c * kDrawsPerCall + i] = (w[i / 2] >> (16 * (i % 2))) & 0xFFFFu;
      }
    }
    return;
  }
  // A shard's offset lies inside a group: draws 0 .. skip-1 of the first are dropped. A shift by
  // the bits of skip, since registers cannot be indexed at run time.
  constexpr int kAll = kSize + kDrawsPerCall;
  uint32_t all[kAll];
#pragma unroll
  for (int c = 0; c < kAll / kDrawsPerCall; ++c) {
    uint32_t w[4];
    philox_group(key, group + c, w);
#pragma unroll
    for (int i = 0; i < kDrawsPerCall; ++i) {
      all[c * kDrawsPerCall + i] = (w[i / 2] >> (16 * (i % 2))) & 0xFFFFu;
    }
  }
  drop_first<4, kAll>(skip, all);
  drop_first<2, kAll>(skip, all);
  drop_first<1, kAll>(skip, all);
#pragma unroll
  for (int i = 0; i < kSize; ++i) draws[i] = all[i];
}

}  // namespace cuda
}  // namespace lowp
