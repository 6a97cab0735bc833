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
static inline void store_packed(void* y, __m512i x) {  // a quarter of one, a quarter of the other
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  _mm512_storeu_si512(y, _mm512_permutexvar_epi64(order, x));
}
static inline void store_signed_bytes(void* y, Shorts a, Shorts b) {
  store_packed(y, _mm512_packs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
static inline void store_unsigned_bytes(void* y, Shorts a, Shorts b) {
  store_packed(y, _mm512_packus_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
static inline Shorts least(Shorts a, Shorts b) {
  return reinterpret_cast<Shorts>(
      _mm512_min_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
static inline Shorts magnitudes(Shorts x) {
  return reinterpret_cast<Shorts>(_mm512_abs_epi16(reinterpret_cast<__m512i>(x)));
}
static inline bool any_below(Shorts x, Shorts limit) {
  return _mm512_cmplt_epi16_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(limit)) !=
         0;
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
static inline void store_packed(void* y, __m256i x) {  // a half of one, a half of the other
  _mm256_storeu_si256(static_cast<__m256i*>(y), _mm256_permute4x64_epi64(x, 0xD8));
}
static inline void store_signed_bytes(void* y, Shorts a, Shorts b) {
  store_packed(y, _mm256_packs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
static inline void store_unsigned_bytes(void* y, Shorts a, Shorts b) {
  store_packed(y, _mm256_packus_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
static inline Shorts least(Shorts a, Shorts b) {
  return reinterpret_cast<Shorts>(
      _mm256_min_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
static inline Shorts magnitudes(Shorts x) {
  return reinterpret_cast<Shorts>(_mm256_abs_epi16(reinterpret_cast<__m256i>(x)));
}
static inline bool any_below(Shorts x, Shorts limit) {
  return _mm256_movemask_epi8(_mm256_cmpgt_epi16(reinterpret_cast<__m256i>(limit),
                                                 reinterpret_cast<__m256i>(x))) != 0;
}
#endif

static inline Shorts kept_shorts(int16_t x) {
  return reinterpret_cast<Shorts>(kept(static_cast<uint16_t>(x) * 0x10001u));
}

// x / scale for |x| <= scale and a scale that is 0 (then 0) or in [2^-64, 2^63): r is 1 / scale
// rounded, q less than two ulps off, and the last line, which adds what q lacks, the IEEE quotient
// but where it is so near to the middle of two floats that the error of r decides: of the 7e7 pairs
// of mantissas that are, none goes wrong (tests/quotients.cpp tries them all). The remainder is
// exact from |x| = 2^-102 on; below that q is under 2^-38, of which no code keeps anything.
class Quotient {
 public:
  explicit Quotient(float scale) : scale_(scale), r_(scale > 0.0f ? 1.0f / scale : 0.0f) {}
  Vec operator()(Vec x) const {
    const Vec r = all(r_), q = x * r;
    return multiply_add(subtract_product(q, all(scale_), x), r, q);
  }
  static bool takes(float scale) {
    return scale == 0.0f || (scale >= 5.42101086e-20f && scale < 9.2233720e18f);
  }

 private:
  float scale_, r_;
};

// What all codes have in common: the upper bits of the float of code 0.
template <int kTop>
constexpr int16_t code_base() {
  return (kOneBits >> kCodeShift) - kTop;
}

// Code magnitudes, not yet times the scale; their floats end within the upper half.
template <int kTop>
__attribute__((always_inline)) static inline Shorts code_floats(Shorts magnitude) {
  const Shorts bits = (magnitude + kept_shorts(code_base<kTop>())) << (kCodeShift - 16);
  return magnitude == 0 ? Shorts{} : bits;
}

__attribute__((always_inline)) static inline Pair load_signed_codes(const int8_t* codes,
                                                                    float scale) {
  const Shorts x = load_signed_bytes(codes);
  const Shorts y = code_floats<127>(magnitudes(x)) | (x & kept_shorts(INT16_MIN));
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

template <int kTop>
static inline Shorts small_codes(Pair y, Bits draw) {
  return reinterpret_cast<Shorts>(small_codes<kTop>(y.even, draw & 0xFFFFu) |
                                  small_codes<kTop>(y.odd, draw >> 16) << 16);
}

static inline Shorts small_signed_codes(Pair y, Bits draw) {
  const Bits even = as_bits(y.even), odd = as_bits(y.odd);
  const Pair size{as_floats(even & 0x7FFFFFFFu), as_floats(odd & 0x7FFFFFFFu)};
  const Shorts sign = reinterpret_cast<Shorts>(upper_halves(even, odd)) >> 15;
  return (small_codes<127>(size, draw) ^ sign) - sign;
}

// The upper bits of y + draw as far as a code goes: 11 of them, and above them the sign.
__attribute__((always_inline)) static inline Shorts rounded_parts(Pair y, Bits draw) {
  using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
  constexpr int kShift = kCodeShift - 16;
  const Bits even = reinterpret_cast<Bits>(reinterpret_cast<Ints>(y.even) >> kShift);
  const Bits odd = reinterpret_cast<Bits>(reinterpret_cast<Ints>(y.odd) >> kShift);
  return reinterpret_cast<Shorts>(upper_halves(even + (draw & kept(0xFFFFu)), odd + (draw >> 16)));
}

struct CodePair {
  Shorts exp_avg, root;
};

// The codes of a moment and of a root, not yet divided by their scales; draws: two a 32-bit lane,
// 0x8000 for nearest.
__attribute__((always_inline)) static inline CodePair encode_pair(Pair exp_avg,
                                                                  const Quotient& of_exp_avg,
                                                                  Bits exp_avg_draw, Pair root,
                                                                  const Quotient& of_root,
                                                                  Bits root_draw) {
  exp_avg = {of_exp_avg(exp_avg.even), of_exp_avg(exp_avg.odd)};
  root = {of_root(root.even), of_root(root.odd)};
  const Shorts parts = rounded_parts(exp_avg, exp_avg_draw);
  const Shorts size = (parts & kept_shorts(0x7FF)) - kept_shorts(code_base<127>());
  const Shorts root_code = rounded_parts(root, root_draw) - kept_shorts(code_base<255>());
  if (__builtin_expect(any_below(least(size, root_code), kept_shorts(2)), false)) {
    return {small_signed_codes(exp_avg, exp_avg_draw), small_codes<255>(root, root_draw)};
  }
  return {parts < 0 ? -size : size, root_code};
}

}  // namespace LOWP_ISA
}  // namespace lowp
