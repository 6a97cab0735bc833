// Elements -> largest magnitudes and int8 codes by vector registers, kVectored elements at a time:
// the values that codes.h defines, where GCC spends as many instructions on narrowing as on all
// else. Included inside the translation units of AVX2 and AVX-512.
#pragma once
#include <immintrin.h>

#include "cpu/floats.h"

namespace lowp {
namespace LOWP_ISA {

#if defined(__AVX512F__)

constexpr int kVectored = 64;

// `around`: past the caches, to an aligned address.
static inline void put(int8_t* codes, __m512i v, bool around) {
  if (around) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(codes), v);
  } else {
    _mm512_storeu_si512(codes, v);
  }
}

// The largest magnitude of x[0 .. n), n a multiple of kVectored.
static inline uint32_t vector_amax(const float* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i amax[4] = {};
  for (int64_t i = 0; i < n; i += kVectored) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i bits = _mm512_loadu_si512(x + i + 16 * j);
      amax[j] = _mm512_max_epu32(amax[j], _mm512_and_si512(bits, magnitude));
    }
  }
  return _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(amax[0], amax[1]), _mm512_max_epu32(amax[2], amax[3])));
}
static inline uint16_t vector_amax(const uint16_t* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i amax[2] = {};
  for (int64_t i = 0; i < n; i += kVectored) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512i bits = _mm512_loadu_si512(x + i + 32 * j);
      amax[j] = _mm512_max_epu16(amax[j], _mm512_and_si512(bits, magnitude));
    }
  }
  const __m512i words = _mm512_max_epu16(amax[0], amax[1]);
  const __m512i low = _mm512_and_si512(words, _mm512_set1_epi32(0xFFFF));
  return static_cast<uint16_t>(
      _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_srli_epi32(words, 16), low)));
}

static inline __m512 floats(const float* x) { return _mm512_loadu_ps(x); }
static inline __m512 floats(const uint16_t* x) {  // fp16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// 32 neighbours, taken apart since two codes, or two 16-bit draws, lie in a 32-bit lane.
struct Halves {
  __m512 even, odd;
};

static inline Halves apart(__m512 low, __m512 high) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

template <bool kIsBf16, class Stored>
static inline Halves halves(const Stored* x) {
  if constexpr (kIsBf16) {
    const __m512i pairs = _mm512_loadu_si512(x);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)))};
  } else {
    return apart(floats(x), floats(x + 16));
  }
}

template <int kStride>
static inline __m512 inverse(const float* inv_scale, int64_t i) {
  return kStride == 0 ? _mm512_set1_ps(*inv_scale) : _mm512_loadu_ps(inv_scale + i);
}

// x * inv_scale; one for each element (kStride 1) may be 0, which gives 0.
template <int kStride>
static inline __m512 product(__m512 x, __m512 inv_scale) {
  if constexpr (kStride == 0) return _mm512_mul_ps(x, inv_scale);
  const __mmask16 there = _mm512_cmp_ps_mask(inv_scale, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_mul_ps(there, x, inv_scale);
}

template <int kStride>
static inline Halves products(Halves x, const float* inv_scale, int64_t i) {
  const __m512 low = inverse<kStride>(inv_scale, i);
  const Halves inv =
      kStride == 0 ? Halves{low, low} : apart(low, inverse<kStride>(inv_scale, i + 16));
  return {product<kStride>(x.even, inv.even), product<kStride>(x.odd, inv.odd)};
}

// The lower words of even lanes beside the upper ones of odd lanes.
static inline __m512i beside(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, even, odd);
}

static inline __m512i bytes(__m512i low, __m512i high) {
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return _mm512_permutexvar_epi64(order, _mm512_packs_epi16(low, high));
}

// Nearest: codes of x[0 .. kVectored).
template <bool kIsBf16, int kStride, class Stored>
static inline __m512i vector_rn(const Stored* x, const float* inv_scale) {
  if constexpr (kIsBf16) {
    const auto words = [&](int64_t i) {
      const Halves v = products<kStride>(halves<true>(x + i), inv_scale, i);
      return beside(_mm512_cvtps_epi32(v.even), _mm512_slli_epi32(_mm512_cvtps_epi32(v.odd), 16));
    };
    return bytes(words(0), words(32));
  } else {
    const auto words = [&](int64_t i) {
      const __m512 low = product<kStride>(floats(x + i), inverse<kStride>(inv_scale, i));
      const __m512 high = product<kStride>(floats(x + i + 16), inverse<kStride>(inv_scale, i + 16));
      return _mm512_packs_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
    };
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words(0), words(32)));
  }
}

// Stochastic: codes of x[0 .. kVectored) as inside_sr gives them. With kStride 0 *inv_scale is 2^16
// times the inverse scale.
template <bool kIsBf16, int kStride, class Stored>
static inline __m512i vector_sr(const Stored* x, const float* inv_scale, const uint16_t* draws) {
  const auto units = [](__m512 v) {
    return _mm512_cvttps_epi32(kStride == 0 ? v : _mm512_mul_ps(v, _mm512_set1_ps(65536.0f)));
  };
  const auto words = [&](int64_t i) {
    const Halves v = products<kStride>(halves<kIsBf16>(x + i), inv_scale, i);
    const __m512i even = units(v.even), odd = units(v.odd), drawn = _mm512_loadu_si512(draws + i);
    const __m512i even_flip = _mm512_srai_epi32(even, 31), odd_flip = _mm512_srai_epi32(odd, 31);
    constexpr int kFirstXorSecondAndThird = 0x28;
    const __m512i even_draw = _mm512_ternarylogic_epi32(drawn, even_flip, _mm512_set1_epi32(0xFFFF),
                                                        kFirstXorSecondAndThird);
    const __m512i odd_draw = _mm512_srli_epi32(_mm512_xor_si512(drawn, odd_flip), 16);
    return beside(_mm512_srli_epi32(_mm512_add_epi32(even, even_draw), 16),
                  _mm512_add_epi32(odd, odd_draw));
  };
  return bytes(words(0), words(32));
}

#else

constexpr int kVectored = 32;

static inline void put(int8_t* codes, __m256i v, bool around) {
  if (around) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(codes), v);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), v);
  }
}

template <bool kIsBf16>
static inline __m256 floats(const float* x) {
  return _mm256_loadu_ps(x);
}
template <bool kIsBf16>
static inline __m256 floats(const uint16_t* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if (!kIsBf16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <bool kIsBf16, int kStride, class Stored>
static inline __m256 product(const Stored* x, const float* inv_scale, int64_t i) {
  const __m256 v = floats<kIsBf16>(x + i);
  if constexpr (kStride == 0) return _mm256_mul_ps(v, _mm256_set1_ps(*inv_scale));
  const __m256 inv = _mm256_loadu_ps(inv_scale + i);
  return _mm256_and_ps(_mm256_mul_ps(v, inv), _mm256_cmp_ps(inv, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}

// code(i): those of the 8 elements from i on, as 32-bit integers
template <class Code>
static inline __m256i bytes(const Code& code) {
  const __m256i low = _mm256_packs_epi32(code(0), code(8));
  const __m256i high = _mm256_packs_epi32(code(16), code(24));
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                     _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}

template <bool kIsBf16, int kStride, class Stored>
static inline __m256i vector_rn(const Stored* x, const float* inv_scale) {
  return bytes(
      [&](int64_t i) { return _mm256_cvtps_epi32(product<kIsBf16, kStride>(x, inv_scale, i)); });
}

template <bool kIsBf16, int kStride, class Stored>
static inline __m256i vector_sr(const Stored* x, const float* inv_scale, const uint16_t* draws) {
  return bytes([&](int64_t i) {
    __m256 v = product<kIsBf16, kStride>(x, inv_scale, i);
    if constexpr (kStride != 0) v = _mm256_mul_ps(v, _mm256_set1_ps(65536.0f));
    const __m256i units = _mm256_cvttps_epi32(v);
    const __m256i flip = _mm256_srli_epi32(_mm256_srai_epi32(units, 31), 16);
    const __m256i draw =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(draws + i)));
    return _mm256_srai_epi32(_mm256_add_epi32(units, _mm256_xor_si256(draw, flip)), 16);
  });
}

#endif

}  // namespace LOWP_ISA
}  // namespace lowp
