// Conversions between fp32 and the 16-bit formats, and the two roundings to each target, by integer
// arithmetic only: the same bits from every compiler, instruction set and device.
// All functions are branch-free so that a plain loop over them vectorizes; GCC makes branches of
// nested conditional expressions, so selects follow one another.
#pragma once
#include "numerics/platform.h"

namespace lowp {

LOWP_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// fp16 -> fp32, exact. Subnormals: the mantissa is placed under the exponent of 2^-14 and the
// implicit one subtracted again (exact by Sterbenz).
LOWP_HD float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t a = h & 0x7FFFu;
  const uint32_t normal = (a << 13) + (112u << 23);
  const uint32_t special = (a << 13) | 0x7F800000u;
  const uint32_t tiny = float_bits(bits_float((a << 13) + (113u << 23)) - bits_float(113u << 23));
  const uint32_t magnitude = a >= 0x7C00u ? special : (a < 0x0400u ? tiny : normal);
  return bits_float(sign | magnitude);
}

// A NaN becomes the quiet NaN of its sign; Inf stays.
LOWP_HD uint16_t float_to_bf16_rn(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t rounded = (a + 0x7FFFu + ((a >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(sign | (a > 0x7F800000u ? 0x7FC0u : rounded));
}

// draw: 0 .. 65535. A finite value never becomes infinite.
LOWP_HD uint16_t float_to_bf16_sr(float x, uint32_t draw) {
  const uint32_t u = float_bits(x);
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t up = (a + draw) >> 16;
  uint32_t code = up > 0x7F7Fu ? 0x7F7Fu : up;
  code = a >= 0x7F800000u ? 0x7F80u : code;
  code = a > 0x7F800000u ? 0x7FC0u : code;
  return static_cast<uint16_t>(sign | code);
}

// Nearest, ties to even, in units of the fp16 spacing at |x|; overflow goes to Inf as IEEE says.
// Normals: drop 13 bits of the fp32 pattern re-biased. Subnormals: adding 2^-1 * 2^(23-24) = 0.5
// aligns the last bit of the sum with 2^-24, so the fp32 adder itself rounds to nearest even.
LOWP_HD uint16_t float_to_fp16_rn(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t rebased = a - (112u << 23);
  const uint32_t normal = (rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13;
  const uint32_t tiny = float_bits(bits_float(a) + 0.5f) - float_bits(0.5f);
  uint32_t code = a < (113u << 23) ? tiny : normal;
  code = a >= 0x477FF000u ? 0x7C00u : code;  // 65520 and above overflow
  code = a > 0x7F800000u ? 0x7E00u : code;
  return static_cast<uint16_t>(sign | code);
}

// draw: 0 .. 65535. The unit is the fp16 spacing at |x| (2^-24 below 2^-14); the discarded fraction
// is cut to 16 bits, so the bias is below 2^-16 unit, toward zero. Finite values saturate at 65504.
LOWP_HD uint16_t float_to_fp16_sr(float x, uint32_t draw) {
  const uint32_t u = float_bits(x);
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t e = a >> 23;
  const uint32_t normal = (a - (112u << 23) + (draw >> 3)) >> 13;  // 13 discarded bits
  // Below 2^-14: |x| = m * 2^(e-150), in units of 2^-24 that is m >> (126 - e).
  const uint32_t m = (a & 0x007FFFFFu) | (e > 0 ? 0x00800000u : 0u);
  uint32_t limited = e > 112u ? 112u : e;
  limited = limited < 102u ? 102u : limited;
  const uint32_t wide = 126u - limited;  // 14 .. 24
  const uint32_t lowest = e > 0u ? e : 1u;
  const uint32_t below = lowest < 102u ? 102u - lowest : 0u;  // further, 0 .. 101
  const uint32_t shifted = below > 31u ? 0u : m >> (below & 31u);
  const uint32_t q = shifted >> wide;
  const uint32_t discarded = shifted & ((1u << wide) - 1u);
  const uint32_t frac16 = wide >= 16u ? discarded >> (wide - 16u) : discarded << (16u - wide);
  const uint32_t tiny = q + ((frac16 + draw) >> 16);
  uint32_t code = a < (113u << 23) ? tiny : normal;
  code = code > 0x7BFFu ? 0x7BFFu : code;
  code = a >= 0x7F800000u ? 0x7C00u : code;
  code = a > 0x7F800000u ? 0x7E00u : code;
  return static_cast<uint16_t>(sign | code);
}

// |v| below 2^22: nearest integer, ties to even, by the fp32 adder.
LOWP_HD int32_t float_to_int_rn(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return static_cast<int32_t>(float_bits(v + kMagic) - float_bits(kMagic));
}

// An int8 code from v = x * inv_scale: clamp to +-127, then round. v must not be NaN.
LOWP_HD int32_t code_rn(float v) {
  const float c = v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v);
  return float_to_int_rn(c);
}

LOWP_HD int32_t code_sr(float v, uint32_t draw) {
  const float m = bits_float(float_bits(v) & 0x7FFFFFFFu);
  const float c = m > 127.0f ? 127.0f : m;
  const int32_t n = static_cast<int32_t>(c);
  const uint32_t frac16 =
      static_cast<uint32_t>(static_cast<int32_t>((c - static_cast<float>(n)) * 65536.0f));
  const int32_t q = n + static_cast<int32_t>((frac16 + draw) >> 16);
  return v < 0.0f ? -q : q;
}

}  // namespace lowp
