// One vector register of 32-bit values and the few operations that a product needs, for the
// instruction set that the translation unit is compiled for.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "numerics/rounding.h"

namespace lowp {
namespace LOWP_ISA {

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kLanes = 16;
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store_around(float* p, Vec v) { _mm512_stream_ps(p, v); }
static inline Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec load_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kLanes = 8;
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline void store_around(float* p, Vec v) { _mm256_stream_ps(p, v); }
static inline Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec load_fp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
using Vec = __m128;
constexpr int kLanes = 4;
static inline Vec load(const float* p) { return _mm_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm_storeu_ps(p, v); }
static inline void store_around(float* p, Vec v) { _mm_stream_ps(p, v); }
static inline Vec broadcast(const float* p) { return _mm_load1_ps(p); }
static inline Vec zero() { return _mm_setzero_ps(); }
static inline Vec add(Vec a, Vec b) { return _mm_add_ps(a, b); }
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
static inline Vec load_fp16(const uint16_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = fp16_to_float(p[i]);
  return x;
}
#endif
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));

// A 32-bit unit, with AVX-512 at any address.
static inline Vec broadcast_unit(const char* p) {
#ifdef __AVX512F__
  float unit;
  memcpy(&unit, p, sizeof unit);
  return broadcast(&unit);
#else
  return broadcast(reinterpret_cast<const float*>(p));
#endif
}

// out[i] = the bytes i of four lines, the first one lowest
static inline void interleave_bytes(const uint8_t* line, int64_t stride, int n,
                                    float* __restrict out) {
  const uint8_t *b = line + stride, *c = b + stride, *d = c + stride;
  for (int i = 0; i < n; ++i) {
    out[i] =
        bits_float(line[i] | uint32_t{b[i]} << 8 | uint32_t{c[i]} << 16 | uint32_t{d[i]} << 24);
  }
}

// out[c * out_stride + r] = in[r * in_stride + c] for a square of kLanes x kLanes 32-bit values, in
// which the bits of `flip` are flipped.
#if defined(__AVX512F__)
static inline void transpose_square(const float* in, int64_t in_stride, float* out,
                                    int64_t out_stride, uint32_t flip = 0) {
  __m512 r[16], t[16];
  const __m512 flipped = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(flip)));
  for (int i = 0; i < 16; ++i) r[i] = _mm512_xor_ps(_mm512_loadu_ps(in + i * in_stride), flipped);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4q + j of rows i .. i+3, in quarter q
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);           // quarters 0 and 2, rows 0 .. 7
    t[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xDD);       // quarters 1 and 3
    t[j + 8] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);  // the same, rows 8 .. 15
    t[j + 12] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xDD);
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_ps(out + j * out_stride, _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88));
    _mm512_storeu_ps(out + (j + 4) * out_stride, _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88));
    _mm512_storeu_ps(out + (j + 8) * out_stride, _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD));
    _mm512_storeu_ps(out + (j + 12) * out_stride, _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xDD));
  }
}
#else
static inline void transpose_square(const float* in, int64_t in_stride, float* out,
                                    int64_t out_stride, uint32_t flip = 0) {
  for (int c = 0; c < kLanes; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      out[c * out_stride + r] = bits_float(float_bits(in[r * in_stride + c]) ^ flip);
    }
  }
}
#endif

}  // namespace LOWP_ISA
}  // namespace lowp
