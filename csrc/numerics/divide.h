// The division of the activations. Elsewhere it is the language's own.
#pragma once
#include "numerics/platform.h"

namespace lowp {

// a / b, correctly rounded, from y, an approximation of 1 / b to one ulp (b <= 2^64): the sequence that
// compilers use for it (Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", IBM Journal 34(1), 1990), without the call to a function for the special cases.
// fma(x, y, z) is x * y + z with one rounding.
// Wants b >= 1 (Inf and NaN too), a quotient that is not subnormal, or else a power of two for b.
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

// Warp groups that multiply must not call functions, or the compiler lets no two of their products
// overlap; their translation units define LOWP_INLINE_DIVISION.
LOWP_HD float divide(float a, float b) {
#if defined(LOWP_INLINE_DIVISION) && defined(__CUDA_ARCH__)
  return divide_inline(
      a, b, [](float x, float y, float z) { return __fmaf_rn(x, y, z); },
      [](float x) {
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
      });
#else
  return a / b;
#endif
}

}  // namespace lowp
