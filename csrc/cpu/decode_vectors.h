// int8 codes times scales -> floats of every type by vector registers, with stores past the caches,
// which GCC has no loop for. Included inside the translation units of AVX2 and AVX-512.
#pragma once
#include <immintrin.h>

#include "cpu/floats.h"
#include "cpu/vector.h"

namespace lowp {
namespace LOWP_ISA {

#if defined(__AVX512F__)

constexpr int kDecoded = 16;
using Values = __m512;
using Halves16 = __m256i;  // 16-bit floats

static inline Values values(const int8_t* codes) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
static inline Values all(const float* p) { return _mm512_set1_ps(*p); }
static inline Values each(const float* p) { return _mm512_loadu_ps(p); }

// Every NaN as the quiet one of its sign.
static inline Values one_nan(Values v) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MIN));
  const __m512i nan = _mm512_or_si512(sign, _mm512_set1_epi32(0x7FC00000));
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_castsi512_ps(nan));
}

static inline Halves16 to_fp16(Values v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Halves16 to_bf16(Values v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), last);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

static inline void store(uint16_t* y, Halves16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), v);
}
static inline void store_around(uint16_t* y, Halves16 v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(y), v);
}

#else

constexpr int kDecoded = 8;
using Values = __m256;
using Halves16 = __m128i;

static inline Values values(const int8_t* codes) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
static inline Values all(const float* p) { return _mm256_broadcast_ss(p); }
static inline Values each(const float* p) { return _mm256_loadu_ps(p); }

static inline Values one_nan(Values v) {
  const __m256i sign = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(INT32_MIN));
  const __m256i nan = _mm256_or_si256(sign, _mm256_set1_epi32(0x7FC00000));
  return _mm256_blendv_ps(v, _mm256_castsi256_ps(nan), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

static inline Halves16 to_fp16(Values v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Halves16 to_bf16(Values v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), last);
  const __m256i words = _mm256_srli_epi32(sum, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static inline void store(uint16_t* y, Halves16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), v);
}
static inline void store_around(uint16_t* y, Halves16 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(y), v);
}

#endif

// The values of y's type, one scale for all of which none may be NaN (stride 0) or one each.
template <Float kType, int kStride>
static inline auto decoded(const int8_t* codes, const float* scale, int64_t i) {
  const Values s = kStride == 0 ? all(scale) : each(scale + i);
  const Values v = values(codes + i) * s;
  if constexpr (kType == Float::fp32) {
    return v;
  } else {
    const Values only = kStride == 0 ? v : one_nan(v);
    if constexpr (kType == Float::bf16) {
      return to_bf16(only);
    } else {
      return to_fp16(only);
    }
  }
}

// y[0 .. n), n a multiple of kDecoded.
template <Float kType, int kStride, class Stored>
static inline void decode_vectors(const int8_t* codes, const float* scale, int64_t n, Stored* y,
                                  bool around) {
  for (int64_t i = 0; i < n; i += kDecoded) {
    if (around) {
      store_around(y + i, decoded<kType, kStride>(codes, scale, i));
    } else {
      store(y + i, decoded<kType, kStride>(codes, scale, i));
    }
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
