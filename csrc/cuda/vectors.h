// Vectors of elements of any float type <-> fp32, by 16-byte accesses where all of them are there.
// Host and device: what the tests build for the CPU is what the GPU runs.
#pragma once
#include "kernel.h"
#include "numerics/rounding.h"

namespace lowp {
namespace cuda {

struct alignas(16) Words {  // one 16-byte access
  uint32_t w[4];
};

LOWP_HD Words load_words(const void* p) {
#ifdef __CUDA_ARCH__
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#else
  return *static_cast<const Words*>(p);
#endif
}

LOWP_HD void store_words(void* p, const Words& v) {
#ifdef __CUDA_ARCH__
  *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
#else
  *static_cast<Words*>(p) = v;
#endif
}

// The same to global memory, in assembly: nvcc takes some stores of a uint4 apart.
LOWP_HD void store_global_words(void* p, const Words& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
#else
  store_words(p, v);
#endif
}

LOWP_HD bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

// Says that a pointer that came out of memory is one to global memory, whose accesses are then the
// plain ones.
LOWP_HD void assume_global(const void* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#else
  (void)p;
#endif
}

// The elements begin .. begin + kSize of a flat array that lie in [from, to).
struct Span {
  int64_t begin;
  int from, to;
  LOWP_HD_MEMBER bool holds(int i) const { return i >= from && i < to; }
};

// Element `begin` on, cut to [low, high).
template <int kSize>
LOWP_HD Span span_of(int64_t begin, int64_t low, int64_t high) {
  const int64_t from = low - begin, to = high - begin;
  return {begin, from < 0 ? 0 : (from > kSize ? kSize : static_cast<int>(from)),
          to < 0 ? 0 : (to > kSize ? kSize : static_cast<int>(to))};
}

template <int kSize>
LOWP_HD bool is_whole(const Span& s) {
  return s.from == 0 && s.to == kSize;
}

LOWP_HD float half_to_float(uint32_t bits, Float type) {
  const uint16_t h = static_cast<uint16_t>(bits);
  return type == Float::bf16 ? bf16_to_float(h) : fp16_to_float(h);
}

// out[i] = fp32(x[s.begin + i]), 0 outside of the span. aligned: x + s.begin lies at a multiple of
// 16 bytes.
template <int kSize>
LOWP_HD void load_floats(const void* x, Float type, const Span& s, bool aligned, float* out) {
  assume_global(x);
  if (aligned && is_whole<kSize>(s)) {
    if (type == Float::fp32) {
      const float* p = static_cast<const float*>(x) + s.begin;
      Words v[kSize / 4];
#pragma unroll
      for (int i = 0; i < kSize / 4; ++i) v[i] = load_words(p + 4 * i);
#pragma unroll
      for (int i = 0; i < kSize; ++i) out[i] = bits_float(v[i / 4].w[i % 4]);
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(x) + s.begin;
      Words v[kSize / 8];
#pragma unroll
      for (int i = 0; i < kSize / 8; ++i) v[i] = load_words(p + 8 * i);
      if (type == Float::bf16) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          out[i] = bf16_to_float(static_cast<uint16_t>(v[i / 8].w[i % 8 / 2] >> (16 * (i % 2))));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          out[i] = fp16_to_float(static_cast<uint16_t>(v[i / 8].w[i % 8 / 2] >> (16 * (i % 2))));
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    out[i] = 0.0f;
    if (!s.holds(i)) continue;
    if (type == Float::fp32) {
      out[i] = static_cast<const float*>(x)[s.begin + i];
    } else {
      out[i] = half_to_float(static_cast<const uint16_t*>(x)[s.begin + i], type);
    }
  }
}

// Bits of an element of a 16-bit type. draw: 0 .. 65535, or kToNearest.
constexpr uint32_t kToNearest = 0x10000u;
LOWP_HD uint32_t float_to_half(float x, Float type, uint32_t draw) {
  if (type == Float::bf16) {
    return draw == kToNearest ? float_to_bf16_rn(x) : float_to_bf16_sr(x, draw);
  }
  return draw == kToNearest ? float_to_fp16_rn(x) : float_to_fp16_sr(x, draw);
}

// The bit patterns of 16-bit elements, inside of the span.
template <int kSize>
LOWP_HD void store_halves(const uint32_t* bits, const Span& s, bool aligned, void* y) {
  assume_global(y);
  uint16_t* p = static_cast<uint16_t*>(y) + s.begin;
  if (aligned && is_whole<kSize>(s)) {
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
      Words v;
#pragma unroll
      for (int j = 0; j < 4; ++j) v.w[j] = bits[8 * i + 2 * j] | bits[8 * i + 2 * j + 1] << 16;
      store_global_words(p + 8 * i, v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (s.holds(i)) p[i] = static_cast<uint16_t>(bits[i]);
  }
}

// y[s.begin + i] = values[i] rounded once, inside of the span; draws: null for nearest.
template <int kSize>
LOWP_HD void store_floats(const float* values, const uint32_t* draws, Float type, const Span& s,
                          bool aligned, void* y) {
  assume_global(y);
  if (type == Float::fp32) {
    float* p = static_cast<float*>(y) + s.begin;
    if (aligned && is_whole<kSize>(s)) {
#pragma unroll
      for (int i = 0; i < kSize / 4; ++i) {
        store_global_words(p + 4 * i,
                           {{float_bits(values[4 * i]), float_bits(values[4 * i + 1]),
                             float_bits(values[4 * i + 2]), float_bits(values[4 * i + 3])}});
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (s.holds(i)) p[i] = values[i];
    }
    return;
  }
  uint32_t bits[kSize];
  if (draws == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) bits[i] = float_to_half(values[i], type, kToNearest);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) bits[i] = float_to_half(values[i], type, draws[i]);
  }
  store_halves<kSize>(bits, s, aligned, y);
}

// 16 bytes as integers, 0 outside of the span; signed or unsigned by the type of x.
template <class Byte>
LOWP_HD void load_codes(const Byte* x, const Span& s, bool aligned, int32_t* out) {
  assume_global(x);
  if (aligned && is_whole<16>(s)) {
    const Words v = load_words(x + s.begin);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i] = static_cast<Byte>(v.w[i / 4] >> (8 * (i % 4)));
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] = s.holds(i) ? x[s.begin + i] : Byte{0};
}

template <class Byte>
LOWP_HD void store_codes(const int32_t* codes, const Span& s, bool aligned, Byte* y) {
  assume_global(y);
  if (aligned && is_whole<16>(s)) {
    Words v;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v.w[j] = (codes[4 * j] & 0xFF) | (codes[4 * j + 1] & 0xFF) << 8 |
               (codes[4 * j + 2] & 0xFF) << 16 | static_cast<uint32_t>(codes[4 * j + 3]) << 24;
    }
    store_global_words(y + s.begin, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (s.holds(i)) y[s.begin + i] = static_cast<Byte>(codes[i]);
  }
}

// The largest absolute bit pattern of n values.
template <int kSize>
LOWP_HD uint32_t amax_bits(const float* x, uint32_t amax) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    amax = a > amax ? a : amax;
  }
  return amax;
}

}  // namespace cuda
}  // namespace lowp
