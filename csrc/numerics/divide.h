// The division of the activations. Elsewhere it is the language's own.
#pragma once
#include "numerics/platform.h"

namespace lowp {

// a / b, correctly rounded, from y, an approximation of 1 / b to one ulp (b <= 2^64): the sequence
// that compilers use for it (Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", IBM Journal 34(1), 1990), without the call to a function for the special
// cases. fma(x, y, z) is x * y + z with one rounding. Wants b >= 1 (Inf and NaN too), a quotient
// that is not subnormal, or else a power of two for b.
template <class Fma, class Reciprocal>
LOWP_HD float divide_inline(float a, float b, const Fma& fma, const Reciprocal& reciprocal) {
  constexpr float kDown = 5.42101086e-20f, kUp = 1.8446744e19f;  // 2^-64 and 2^64
  const float magnitude = bits_float(float_bits(a) & 0x7FFFFFFFu);
  const bool large_a = magnitude > kUp, large_b = b > kUp;
  const float n = large_a ? a * kDown : a;
  const float d = large_b ? b * kDown : b;
  float y = reciprocal(d);
  y = fma(y, fma(-d, y, 1.0f), y);
  float q = n * y;
  const float plain = q;
  q = fma(fma(-d, q, n), y, q);
  q = fma(fma(-d, q, n), y, q);
  q = magnitude < 7.8886091e-31f ? plain : q;  // 2^-100, below which the residual may be lost
  q = large_a ? q * kUp : q;
  q = large_b ? q * kDown : q;
  const float infinity = bits_float(0x7F800000u);
  q = magnitude == infinity ? a : q;
  q = b == infinity ? a * 0.0f : q;
  return b != b ? b : q;
}

// 1 / b for b >= 1 (Inf and NaN too), correctly rounded where it is subnormal as well: there
// divide_inline rounds twice, and what is left of 1 tells which way it went wrong.
template <class Fma, class Reciprocal>
LOWP_HD float reciprocal_inline(float b, const Fma& fma, const Reciprocal& reciprocal) {
  constexpr float kDown = 5.42101086e-20f, kUp = 1.8446744e19f;  // 2^-64 and 2^64
  constexpr float kHalf = 1.29246971e-26f;  // 2^-86: half of the least subnormal, times 2^64
  const float q = divide_inline(1.0f, b, fma, reciprocal);
  const float d = b * kDown, least = bits_float(1u);
  const float left = fma(-d, q * kUp, 1.0f);
  const float low = left < d * -kHalf ? q - least : q;
  const float near = left > d * kHalf ? q + least : low;
  return b > 8.50705917e37f ? near : q;  // 2^126
}

// Warp groups that multiply must not call functions, or the compiler lets no two of their products
// overlap; their translation units define LOWP_INLINE_DIVISION.
#if defined(LOWP_INLINE_DIVISION) && defined(__CUDA_ARCH__)
struct DeviceFma {
  __device__ __forceinline__ float operator()(float x, float y, float z) const {
    return __fmaf_rn(x, y, z);
  }
};
struct DeviceReciprocal {
  __device__ __forceinline__ float operator()(float x) const {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
LOWP_HD float divide(float a, float b) {
  return divide_inline(a, b, DeviceFma(), DeviceReciprocal());
}
LOWP_HD float reciprocal(float b) { return reciprocal_inline(b, DeviceFma(), DeviceReciprocal()); }
#else
LOWP_HD float divide(float a, float b) { return a / b; }
LOWP_HD float reciprocal(float b) { return 1.0f / b; }
#endif

}  // namespace lowp
