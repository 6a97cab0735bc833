// From the largest magnitude of a group to its int8 scale.
#pragma once
#include "numerics/platform.h"

namespace lowp {

struct Scale {
  float scale;      // x = code * scale; 0 for a group of zeros, NaN for one that holds Inf or NaN
  float inv_scale;  // code = round(x * inv_scale); 0 in both special cases: all codes are then 0
};

// amax_bits: the largest absolute bit pattern of the group, so a NaN wins over everything.
LOWP_HD Scale scale_of(uint32_t amax_bits) {
  const float amax = bits_float(amax_bits);
  if (amax_bits >= 0x7F800000u) return {bits_float(0x7FC00000u), 0.0f};
  if (amax_bits < (8u << 23)) return {0.0f, 0.0f};  // 2^-119
  return {amax / 127.0f, 127.0f / amax};
}

}  // namespace lowp
