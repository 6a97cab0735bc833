// Sixteen values to sixteen codes: what every kernel that quantizes does to a vector.
#pragma once
#include "cuda/noise.h"
#include "cuda/vectors.h"
#include "numerics/scale.h"

namespace lowp {
namespace cuda {

struct CodeNoise {
  Rounding rounding;
  PhiloxKey key;
  const int64_t* step;  // on the device, or null: the key's own
  int64_t offset;       // global index of the first element
};

// kStride 0: one inv_scale for all; 1: one each. An inv_scale of 0 makes codes 0, whatever x is.
// element: index of x[0] in its tensor; may be below 0 where the first elements lie outside.
template <int kStride>
LOWP_HD void encode_vector(const float* x, const float* inv_scale, const CodeNoise& noise,
                           int64_t element, int32_t* codes) {
  if (noise.rounding == Rounding::nearest) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float inv = inv_scale[i * kStride];
      codes[i] = code_rn(inv == 0.0f ? 0.0f : x[i] * inv);
    }
    return;
  }
  PhiloxKey key = noise.key;
  if (noise.step != nullptr) key.step = static_cast<uint32_t>(*noise.step);
  uint32_t draws[16];
  fill_draws<16>(key, static_cast<uint64_t>(noise.offset + element), draws);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float inv = inv_scale[i * kStride];
    codes[i] = code_sr(inv == 0.0f ? 0.0f : x[i] * inv, draws[i]);
  }
}

}  // namespace cuda
}  // namespace lowp
