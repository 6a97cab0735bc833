// The 8-bit code of an optimizer state: a block float with 3 mantissa bits, read off the bits of
// x / amax by shifts, so there is no table. Blocks of kStateBlock elements share one fp32 amax.
//   code 0 is zero; code c > 0 is the float of bits(1.0) - (top - c) * 2^20, times amax
// Signed codes (top 127, sign and magnitude as an int8) reach down 15.75 binades, unsigned ones
// (top 255, for square roots of second moments) 31.75.
#pragma once
#include "numerics/platform.h"

namespace lowp {

constexpr int kStateBlock = 256;
constexpr int kCodeShift = 20;  // 23 mantissa bits of fp32 less 3
constexpr uint32_t kOneBits = 0x3F800000u;

// The scale of a block whose largest absolute bit pattern is amax_bits: 0 below 2^-119, NaN if not
// finite.
LOWP_HD float state_scale(uint32_t amax_bits) {
  uint32_t bits = amax_bits < (8u << 23) ? 0u : amax_bits;
  bits = amax_bits >= 0x7F800000u ? 0x7FC00000u : bits;
  return bits_float(bits);
}

// Code of the magnitude y = |x| / scale in [0, 1]. offset: 0x80000 rounds to nearest (ties up),
// draw << 4 stochastically. tiny: what decides between 0 and code 1, as a fraction of 65536:
// 0x8000, or the draw.
template <int kTop>
LOWP_HD int32_t encode_magnitude(float y, uint32_t offset, uint32_t tiny) {
  // Code 1 stands for 1.25 * 2^-16 (signed) or 1.25 * 2^-32: y in 65536ths of it.
  constexpr float kParts =
      kTop == 127 ? 0.8f * 65536.0f * 65536.0f : 0.8f * 4294967296.0f * 65536.0f;
  const int32_t v = (kTop << kCodeShift) - static_cast<int32_t>(kOneBits - float_bits(y));
  int32_t code = (v + static_cast<int32_t>(offset)) >> kCodeShift;
  const float part = y * kParts;
  const float limited = part < 65535.0f ? part : 65535.0f;
  const int32_t low = (static_cast<int32_t>(limited) + static_cast<int32_t>(tiny)) >> 16;
  code = v < (1 << kCodeShift) ? low : code;
  code = code > kTop ? kTop : code;
  return code;
}

template <int kTop>
LOWP_HD float decode_magnitude(int32_t code, float scale) {
  const uint32_t bits = kOneBits - (static_cast<uint32_t>(kTop - code) << kCodeShift);
  return (code == 0 ? 0.0f : bits_float(bits)) * scale;
}

// draw: 0 .. 65535, or kNearest
constexpr uint32_t kNearest = 0x10000u;
LOWP_HD uint32_t code_offset(uint32_t draw) { return draw == kNearest ? 0x80000u : draw << 4; }
LOWP_HD uint32_t code_tiny(uint32_t draw) { return draw == kNearest ? 0x8000u : draw; }

// x in a block of the given scale; 0 when the scale is 0 or NaN
LOWP_HD int8_t encode_signed(float x, float scale, uint32_t draw) {
  const float y = bits_float(float_bits(x) & 0x7FFFFFFFu) / scale;
  const float safe = scale > 0.0f ? y : 0.0f;
  const int32_t code = encode_magnitude<127>(safe, code_offset(draw), code_tiny(draw));
  return static_cast<int8_t>(float_bits(x) >> 31 ? -code : code);
}

LOWP_HD float decode_signed(int8_t code, float scale) {
  const int32_t c = code;
  const float x = decode_magnitude<127>(c < 0 ? -c : c, scale);
  return c < 0 ? -x : x;
}

// x >= 0; what is above zero never gets code 0, for its reciprocal is what the update uses
LOWP_HD uint8_t encode_unsigned(float x, float scale, uint32_t draw) {
  const float y = x / scale;
  const float safe = scale > 0.0f ? y : 0.0f;
  const int32_t code = encode_magnitude<255>(safe, code_offset(draw), code_tiny(draw));
  return static_cast<uint8_t>(safe > 0.0f && code == 0 ? 1 : code);
}

LOWP_HD float decode_unsigned(uint8_t code, float scale) {
  return decode_magnitude<255>(code, scale);
}

}  // namespace lowp
