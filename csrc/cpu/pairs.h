// 2 * kLanes elements of any type as two vectors of fp32: those with an even index and those with
// an odd one, for so 16-bit elements come and go without a shuffle, two in a 32-bit lane.
// Included inside the translation units of instruction sets from AVX2 on.
#pragma once
#include "cpu/vector.h"
#include "kernel.h"
#include "numerics/platform.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kPair = 2 * kLanes;

constexpr float kSmall = 8.5070592e37f;  // 2^126

struct Pair {
  Vec even, odd;
};

static inline Vec all(float x) { return broadcast(&x); }
static inline Vec as_floats(Bits x) { return reinterpret_cast<Vec>(x); }
static inline Bits as_bits(Vec x) { return reinterpret_cast<Bits>(x); }

#if defined(__AVX512F__)
static inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }
static inline Vec subtract_product(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
static inline Vec least_magnitude(Vec a, Vec b) {  // |a| or |b|; neither is NaN
  return _mm512_range_ps(a, b, 0b1010);
}
static inline Vec greatest_magnitude(Vec a, Vec b) { return _mm512_range_ps(a, b, 0b1011); }
static inline bool is_small(Vec x) {
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmall), _CMP_LT_OQ) == 0xFFFF;
}
static inline Bits greatest(Bits a, Bits b) {
  return reinterpret_cast<Bits>(
      _mm512_max_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
static inline Bits truncated(Vec x) { return reinterpret_cast<Bits>(_mm512_cvttps_epi32(x)); }
static inline uint32_t greatest_of(Bits x) {
  return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(x));
}
static inline Pair split(Vec a, Vec b) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
}
static inline Pair merged(Pair x) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high =
      _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  return {_mm512_permutex2var_ps(x.even, low, x.odd), _mm512_permutex2var_ps(x.even, high, x.odd)};
}
static inline void store_fp16(uint16_t* y, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline Vec square_root(Vec x) { return _mm256_sqrt_ps(x); }
static inline Vec subtract_product(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
static inline Vec magnitude(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline Vec least_magnitude(Vec a, Vec b) {  // |a| or |b|; neither is NaN
  return _mm256_min_ps(magnitude(a), magnitude(b));
}
static inline Vec greatest_magnitude(Vec a, Vec b) {
  return _mm256_max_ps(magnitude(a), magnitude(b));
}
static inline bool is_small(Vec x) {
  const Vec below = _mm256_cmp_ps(x, _mm256_set1_ps(kSmall), _CMP_LT_OQ);
  return _mm256_movemask_ps(below) == 0xFF;
}
static inline Bits greatest(Bits a, Bits b) {
  return reinterpret_cast<Bits>(
      _mm256_max_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
static inline Bits truncated(Vec x) { return reinterpret_cast<Bits>(_mm256_cvttps_epi32(x)); }
static inline uint32_t greatest_of(Bits x) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
static inline __m256 quarters(__m256 x) {  // 64-bit quarters 0, 2, 1, 3
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xD8));
}
static inline Pair split(Vec a, Vec b) {
  return {quarters(_mm256_shuffle_ps(a, b, 0x88)), quarters(_mm256_shuffle_ps(a, b, 0xDD))};
}
static inline Pair merged(Pair x) {
  const Vec low = _mm256_unpacklo_ps(x.even, x.odd), high = _mm256_unpackhi_ps(x.even, x.odd);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
static inline void store_fp16(uint16_t* y, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// A constant that stays in a register: GCC would make one that it knows anew at every use, by a
// shuffle each.
static inline Bits kept(uint32_t x) {
  Bits bits = Bits{} + x;
  asm("" : "+v"(bits));
  return bits;
}

// The compiler makes x before and uses it behind, and moves neither beyond.
static inline void stay(Pair& x) { asm volatile("" : "+v"(x.even), "+v"(x.odd)); }

static inline Bits load_bits(const void* x) {
  Bits bits;
  memcpy(&bits, x, sizeof bits);
  return bits;
}

// The upper halves of even and odd lanes as 16-bit elements in order.
#if defined(__AVX512F__)
static inline Bits upper_halves(Bits even, Bits odd) {
  const __m512i down = _mm512_set4_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);  // bytes of a quarter
  return reinterpret_cast<Bits>(_mm512_mask_shuffle_epi8(
      reinterpret_cast<__m512i>(odd), 0x3333333333333333u, reinterpret_cast<__m512i>(even), down));
}
#else
static inline Bits upper_halves(Bits even, Bits odd) {
  return reinterpret_cast<Bits>(_mm256_blend_epi16(reinterpret_cast<__m256i>(even >> 16),
                                                   reinterpret_cast<__m256i>(odd), 0xAA));
}
#endif
static inline Pair from_upper_halves(Bits x) {
  return {as_floats(x << 16), as_floats(x & kept(0xFFFF0000u))};
}

// How elements of one tensor are stored.
template <Float kFloat, bool kDrawn>
struct Format {
  static constexpr Float type = kFloat;
  static constexpr bool drawn = kDrawn;
  static constexpr int64_t size = kFloat == Float::fp32 ? 4 : 2;
};

// body(format) for one of the five formats
template <class Body>
static inline void with_format(Float type, bool drawn, const Body& body) {
  if (type == Float::fp32) return body(Format<Float::fp32, false>{});
  if (type == Float::bf16) {
    return drawn ? body(Format<Float::bf16, true>{}) : body(Format<Float::bf16, false>{});
  }
  return drawn ? body(Format<Float::fp16, true>{}) : body(Format<Float::fp16, false>{});
}

template <Float kType>
static inline Pair load_pair(const void* x, int64_t begin) {
  const uint16_t* halves = static_cast<const uint16_t*>(x) + begin;
  const float* floats = static_cast<const float*>(x) + begin;
  if (kType == Float::fp32) return split(load(floats), load(floats + kLanes));
  if (kType == Float::bf16) return from_upper_halves(load_bits(halves));
  return split(load_fp16(halves), load_fp16(halves + kLanes));
}

// Values below 2^64 as fp16 codes in the upper halves and 16 bits of fraction in the lower ones, to
// which draws are added. As float_to_fp16_sr: a subnormal code counts units of 2^-24, and its
// fraction is cut to 2^-40.
__attribute__((always_inline)) static inline Bits fp16_parts(Vec x) {
  const Vec a = least_magnitude(x, all(65504.0f));
  const Bits normal = (as_bits(a) - (112u << 23)) << 3;
  const Bits parts = as_bits(a) < (113u << 23) ? truncated(a * 1099511627776.0f) : normal;
  return parts | (as_bits(x) & 0x80000000u);
}

// Values below 2^64, so neither NaN nor Inf. draws: two a 32-bit lane, if the format is drawn.
template <class Format>
__attribute__((always_inline)) static inline void store_pair(Format, Pair x, const uint16_t* draws,
                                                             void* y, int64_t begin) {
  uint16_t* halves = static_cast<uint16_t*>(y) + begin;
  const Bits even = as_bits(x.even), odd = as_bits(x.odd);
  Bits out;
  if (Format::type == Float::fp32) {
    const Pair values = merged(x);
    store(static_cast<float*>(y) + begin, values.even);
    store(static_cast<float*>(y) + begin + kLanes, values.odd);
    return;
  }
  if (Format::type == Float::fp16 && !Format::drawn) {
    const Pair values = merged(x);
    store_fp16(halves, values.even);
    store_fp16(halves + kLanes, values.odd);
    return;
  }
  if (Format::drawn) {
    const bool fp16 = Format::type == Float::fp16;
    const Bits draw = load_bits(draws);
    out = upper_halves((fp16 ? fp16_parts(x.even) : even) + (draw & kept(0xFFFFu)),
                       (fp16 ? fp16_parts(x.odd) : odd) + (draw >> 16));
  } else {
    out = upper_halves(even + (even >> 16 & 1u) + 0x7FFFu, odd + (odd >> 16 & 1u) + 0x7FFFu);
  }
  memcpy(halves, &out, sizeof out);
}

}  // namespace LOWP_ISA
}  // namespace lowp
