// Runs of float elements -> largest magnitudes and int8 codes. The loops read elements as they are
// stored, so that all that is done to one happens in registers, and magnitudes are compared as the
// integers that they are, 16 bits wide where the elements are. Included inside every instruction
// set's translation unit.
#pragma once
#include "cpu/floats.h"
#if defined(__AVX2__)
#include "cpu/code_vectors.h"
#endif

namespace lowp {
namespace LOWP_ISA {

struct Fp32Element {
  static constexpr bool kIsBf16 = false;
  using Stored = float;
  using Magnitude = uint32_t;
  static float value(Stored x) { return x; }
  static Magnitude magnitude(Stored x) { return float_bits(x) & 0x7FFFFFFFu; }
  static uint32_t fp32_bits(Magnitude m) { return m; }
};
struct Bf16Element {
  static constexpr bool kIsBf16 = true;
  using Stored = uint16_t;
  using Magnitude = uint16_t;
  static float value(Stored x) { return bf16_to_float(x); }
  static Magnitude magnitude(Stored x) { return static_cast<Magnitude>(x & 0x7FFFu); }
  static uint32_t fp32_bits(Magnitude m) { return float_bits(bf16_to_float(m)); }
};
struct Fp16Element : Bf16Element {
  static constexpr bool kIsBf16 = false;
  static float value(Stored x) { return fp16_to_float(x); }
  static uint32_t fp32_bits(Magnitude m) { return float_bits(fp16_to_float(m)); }
};

// body(element) with the element of a run-time type.
template <class Body>
static inline void with_element(Float type, const Body& body) {
  switch (type) {
    case Float::fp32:
      return body(Fp32Element{});
    case Float::bf16:
      return body(Bf16Element{});
    default:
      return body(Fp16Element{});
  }
}

template <class Element>
static inline typename Element::Magnitude amax_of(const typename Element::Stored* x, int64_t n) {
  typename Element::Magnitude amax = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  i = n - n % kVectored;
  amax = vector_amax(x, i);
#endif
  for (; i < n; ++i) {
    const typename Element::Magnitude a = Element::magnitude(x[i]);
    amax = a > amax ? a : amax;
  }
  return amax;
}

// amax[i] = the larger of it and |x[i]|
template <class Element>
static inline void max_into(const typename Element::Stored* x, int64_t n,
                            typename Element::Magnitude* __restrict amax) {
  for (int64_t i = 0; i < n; ++i) {
    const typename Element::Magnitude a = Element::magnitude(x[i]);
    amax[i] = a > amax[i] ? a : amax[i];
  }
}

// v = x * inv_scale with |x| at most the amax of inv_scale = 127 / amax: two roundings keep |v|
// below 127 (1 + 2^-23 + 2^-48) < 127 + 2^-16, so neither rounding needs code_rn's or code_sr's
// clamp to give their codes. The sum of float_to_int_rn has the code in its low byte.
static inline int8_t inside_rn(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23, whose low byte is 0
  return static_cast<int8_t>(float_bits(v + kMagic));
}

// In units of 2^-16 the cut value is the integer part and the 16 bits of fraction at once. Rounding
// a negative one's magnitude up by a draw is rounding itself down by 65535 - draw.
static inline int8_t inside_sr(float v, uint32_t draw) {
  const int32_t units = static_cast<int32_t>(v * 65536.0f);
  const uint32_t flip = static_cast<uint32_t>(units >> 31) >> 16;
  return static_cast<int8_t>((units + static_cast<int32_t>(draw ^ flip)) >> 16);
}

// inv_scale: one that is not 0 (stride 0), or one a column (stride 1), 0 where all codes are 0.
template <class Element, int kStride>
static inline float scaled(typename Element::Stored x, const float* inv_scale, int64_t i) {
  const float inv = inv_scale[i * kStride];
  const float v = Element::value(x) * inv;
  return kStride != 0 && inv == 0.0f ? 0.0f : v;
}

template <class Element, int kStride>
static inline void codes_rn(const typename Element::Stored* x, const float* inv_scale, int64_t n,
                            int8_t* __restrict codes, [[maybe_unused]] bool around) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kVectored <= n; i += kVectored) {
    put(codes + i, vector_rn<Element::kIsBf16, kStride>(x + i, inv_scale + i * kStride), around);
  }
#endif
  for (; i < n; ++i) codes[i] = inside_rn(scaled<Element, kStride>(x[i], inv_scale, i));
}

template <class Element, int kStride>
static inline void codes_sr(const typename Element::Stored* x, const float* inv_scale,
                            const uint16_t* draws, int64_t n, int8_t* __restrict codes,
                            [[maybe_unused]] bool around) {
  int64_t i = 0;
#if defined(__AVX2__)
  const float wide = *inv_scale * 65536.0f;
  const bool fits = kStride != 0 || wide <= 3.4e38f;
  for (; fits && i + kVectored <= n; i += kVectored) {
    const float* const inv = kStride == 0 ? &wide : inv_scale + i;
    put(codes + i, vector_sr<Element::kIsBf16, kStride>(x + i, inv, draws + i), around);
  }
#endif
  for (; i < n; ++i) {
    codes[i] = inside_sr(scaled<Element, kStride>(x[i], inv_scale, i), draws[i]);
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
