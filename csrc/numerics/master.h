// A weight as a bf16 value and the 16 bits that it lacks: together the fp32 value, exactly.
#pragma once
#include "numerics/platform.h"

namespace lowp {

// The bf16 part is the nearest one, ties away from zero, so that the low bits are a signed distance
// to it; beyond the largest finite bf16 it is Inf, and the sum of both is still the fp32 value.
LOWP_HD uint16_t high_part(float x) {
  return static_cast<uint16_t>((float_bits(x) + 0x8000u) >> 16);
}

LOWP_HD uint16_t low_part(float x) { return static_cast<uint16_t>(float_bits(x)); }

LOWP_HD float join_parts(uint16_t high, uint16_t low) {
  const int32_t distance = static_cast<int16_t>(low);
  return bits_float((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(distance));
}

}  // namespace lowp
