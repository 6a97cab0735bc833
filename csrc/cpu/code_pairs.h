// The 8-bit codes of numerics/codec.h by pairs: codes are 16-bit lanes, and a scale's quotient
// costs no division.
#pragma once
#include "cpu/pairs.h"
#include "numerics/codec.h"

namespace lowp {
namespace LOWP_ISA {

using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));

#if defined(__AVX512F__)
static inline Shorts load_signed_bytes(const int8_t* x) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return reinterpret_cast<Shorts>(_mm512_cvtepi8_epi16(bytes));
}
static inline Shorts load_unsigned_bytes(const uint8_t* x) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return reinterpret_cast<Shorts>(_mm512_cvtepu8_epi16(bytes));
}
static inline void store_bytes(void* y, Shorts x) {
  _mm256_storeu_si256(static_cast<__m256i*>(y), _mm512_cvtepi16_epi8(reinterpret_cast<__m512i>(x)));
}
static inline bool any_below(Shorts x, int16_t limit) {
  return _mm512_cmplt_epi16_mask(reinterpret_cast<__m512i>(x), _mm512_set1_epi16(limit)) != 0;
}
#else
static inline Shorts load_signed_bytes(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(bytes));
}
static inline Shorts load_unsigned_bytes(const uint8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return reinterpret_cast<Shorts>(_mm256_cvtepu8_epi16(bytes));
}
static inline void store_bytes(void* y, Shorts x) {
  const __m256i low = reinterpret_cast<__m256i>(x & 0xFF);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(static_cast<__m128i*>(y), bytes);
}
static inline bool any_below(Shorts x, int16_t limit) {
  return _mm256_movemask_epi8(
             _mm256_cmpgt_epi16(_mm256_set1_epi16(limit), reinterpret_cast<__m256i>(x))) != 0;
}
#endif

// x / scale for |x| <= scale and a scale that is 0 (then 0) or in [2^-64, 2^64).
// r + low is 1 / scale but for 2^-47 of it, so q is less than an ulp off, its remainder fits 24
// bits and, by Markstein's theorem (numerics/divide.h), the last line is the IEEE quotient. The
// remainder is exact from |x| = 2^-102 on; below that q is under 2^-38, of which no code keeps
// anything.
class Quotient {
 public:
  explicit Quotient(float scale) : scale_(scale) {
    r_ = scale > 0.0f ? 1.0f / scale : 0.0f;
    low_ = __builtin_fmaf(-r_, scale, 1.0f) * r_;
  }
  Vec operator()(Vec x) const {
    const Vec r = all(r_), q = multiply_add(x, r, x * low_);
    return multiply_add(subtract_product(q, all(scale_), x), r, q);
  }
  static bool takes(float scale) { return scale == 0.0f || scale >= 5.42101086e-20f; }

 private:
  float scale_, r_, low_;
};

// What all codes have in common: the upper bits of the float of code 0.
template <int kTop>
constexpr int16_t code_base() {
  return (kOneBits >> kCodeShift) - kTop;
}

// Code magnitudes, not yet times the scale; their floats end within the upper half.
template <int kTop>
__attribute__((always_inline)) static inline Shorts code_floats(Shorts magnitude) {
  const Shorts bits = (magnitude + code_base<kTop>()) << (kCodeShift - 16);
  return magnitude == 0 ? Shorts{} : bits;
}

__attribute__((always_inline)) static inline Pair load_signed_codes(const int8_t* codes,
                                                                    float scale) {
  const Shorts x = load_signed_bytes(codes);
  const Shorts y = code_floats<127>(x < 0 ? -x : x) | (x & INT16_MIN);
  const Pair p = from_upper_halves(reinterpret_cast<Bits>(y));
  return {p.even * scale, p.odd * scale};
}

__attribute__((always_inline)) static inline Pair load_square_codes(const uint8_t* codes,
                                                                    float scale) {
  const Shorts y = code_floats<255>(load_unsigned_bytes(codes));
  Pair p = from_upper_halves(reinterpret_cast<Bits>(y));
  p = {p.even * scale, p.odd * scale};
  return {p.even * p.even, p.odd * p.odd};
}

// encode_magnitude in 32-bit lanes, where some y is around code 1 or below.
template <int kTop>
__attribute__((noinline, cold)) static Bits small_codes(Vec y, Bits draw) {
  constexpr float kParts =
      kTop == 127 ? 0.8f * 65536.0f * 65536.0f : 0.8f * 4294967296.0f * 65536.0f;
  const Vec part = y * kParts;
  const Bits low = (truncated(part < 65535.0f ? part : all(65535.0f)) + draw) >> 16;
  const Bits code = (((as_bits(y) >> 4) + draw) >> 16) - uint32_t{code_base<kTop>()};
  const Bits chosen = as_bits(y) < (code_base<kTop>() + 1u) << kCodeShift ? low : code;
  const Bits least = low - low + (kTop == 255 ? 1u : 0u);
  return as_bits(y) == 0 ? chosen - chosen : greatest(chosen, least);
}

// Codes of magnitudes y in [0, 1]; draw: two a 32-bit lane, 0x8000 for nearest.
template <int kTop>
__attribute__((always_inline)) static inline Shorts encode_magnitudes(Pair y, Bits draw) {
  const Bits even = (as_bits(y.even) >> 4) + (draw & 0xFFFFu);
  const Bits odd = (as_bits(y.odd) >> 4) + (draw >> 16);
  const Shorts code = reinterpret_cast<Shorts>(upper_halves(even, odd)) - code_base<kTop>();
  if (__builtin_expect(!any_below(code, 2), true)) return code;
  return reinterpret_cast<Shorts>(small_codes<kTop>(y.even, draw & 0xFFFFu) |
                                  small_codes<kTop>(y.odd, draw >> 16) << 16);
}

__attribute__((always_inline)) static inline void store_signed_codes(Pair x,
                                                                     const Quotient& quotient,
                                                                     Bits draw, int8_t* codes) {
  const Bits even = as_bits(x.even), odd = as_bits(x.odd);
  const Pair y{quotient(as_floats(even & 0x7FFFFFFFu)), quotient(as_floats(odd & 0x7FFFFFFFu))};
  const Shorts code = encode_magnitudes<127>(y, draw);
  const Shorts sign = reinterpret_cast<Shorts>(upper_halves(even, odd)) >> 15;
  store_bytes(codes, (code ^ sign) - sign);
}

__attribute__((always_inline)) static inline void store_root_codes(Pair root,
                                                                   const Quotient& quotient,
                                                                   Bits draw, uint8_t* codes) {
  const Pair y{quotient(root.even), quotient(root.odd)};
  store_bytes(codes, encode_magnitudes<255>(y, draw));
}

}  // namespace LOWP_ISA
}  // namespace lowp
