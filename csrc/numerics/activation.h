// The activations and their derivatives in fp32, by IEEE + - * / and integer operations only: no
// libm and no fma, so every compiler and device gives the same bits. Branch-free. Accuracy:
// lowp/reference/activation.py, which this repeats operation by operation.
#pragma once
#include "numerics/divide.h"

namespace lowp {

enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// 2^n * polynomial (Cody and Waite, "Software manual for the elementary functions", 1980,
// chapter 6): +Inf above 88.72, 0 below -87.33 (no subnormal results); NaN stays NaN.
LOWP_HD float exp_fp32(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float low = x < -87.33f ? -87.33f : x;
  const float c = low > 88.72f ? 88.72f : low;
  const float t = c * 1.44269504f + kMagic;
  const float n = t - kMagic;
  const float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = r * 0.0013813161f + 0.0083694104f;
  q = q * r + 0.041668456f;
  q = q * r + 0.16666515f;
  q = q * r + 0.49999994f;
  const float p = (q * (r * r) + r) + 1.0f;
  // 2^n in two factors: n reaches 128, whose power alone is not an fp32.
  const int32_t whole = static_cast<int32_t>(float_bits(t) - float_bits(kMagic));
  const int32_t half = whole >> 1;
  const float s1 = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float s2 = bits_float(static_cast<uint32_t>(whole - half + 127) << 23);
  const float y = p * s1 * s2;
  const float upper = x > 88.72f ? bits_float(0x7F800000u) : y;
  const float both = x < -87.33f ? 0.0f : upper;
  return x != x ? x : both;
}

LOWP_HD float sigmoid_fp32(float x) { return reciprocal(1.0f + exp_fp32(-x)); }

// 2 u(x) of gelu_tanh: sqrt(8/pi) (x + 0.044715 x^3)
LOWP_HD float gelu_tanh_argument(float x) { return 1.59576912f * (x + 0.044715f * (x * x * x)); }

// exp(-x^2/2)
LOWP_HD float gaussian_fp32(float x) { return exp_fp32(-0.5f * (x * x)); }

// Phi(x): erfc(t) = exp(-t^2) P(1 / (1 + c t)), so the left tail keeps its relative accuracy.
LOWP_HD float normal_cdf_fp32(float x, float gaussian) {
  const float t = bits_float(float_bits(x) & 0x7FFFFFFFu) * 0.707106781f;
  const float s = divide(1.0f, 1.0f + 0.3f * t);
  float q = s * -0.064701088f + 0.24246506f;
  q = q * s + -0.25542724f;
  q = q * s + 0.27296478f;
  q = q * s + -0.046637621f;
  q = q * s + 0.10713308f;
  q = q * s + 0.074265987f;
  q = q * s + 0.085341953f;
  q = q * s + 0.084595084f;
  const float tail = gaussian * (q * s);
  return x < 0.0f ? tail : 1.0f - tail;
}

// Beyond +-126 every function here equals its limit; cut there, Inf * 0 does not arise.
LOWP_HD float cut_low(float x) { return x < -126.0f ? -126.0f : x; }
LOWP_HD float cut_both(float x) {
  const float low = cut_low(x);
  return low > 126.0f ? 126.0f : low;
}

LOWP_HD float relu_fp32(float x) { return x < 0.0f ? 0.0f : x; }

LOWP_HD float silu_fp32(float x) {
  const float c = cut_low(x);
  return divide(c, 1.0f + exp_fp32(-c));
}

LOWP_HD float gelu_tanh_fp32(float x) {
  const float c = cut_low(x);
  return divide(c, 1.0f + exp_fp32(-gelu_tanh_argument(c)));
}

LOWP_HD float gelu_fp32(float x) {
  const float c = cut_low(x);
  return c * normal_cdf_fp32(c, gaussian_fp32(c));
}

// relu's derivative at a NaN is 1, so that NaN gradients are not hidden (as in torch).
LOWP_HD float relu_derivative(float x) { return x <= 0.0f ? 0.0f : 1.0f; }

LOWP_HD float silu_derivative(float x) {
  const float c = cut_both(x);
  const float s = sigmoid_fp32(c);
  return s * (1.0f + c * (1.0f - s));
}

LOWP_HD float gelu_tanh_derivative(float x) {
  const float c = cut_both(x);
  const float s = sigmoid_fp32(gelu_tanh_argument(c));
  const float slope = 1.59576912f * (1.0f + 0.134145f * (c * c));
  return s + c * (s * (1.0f - s)) * slope;
}

LOWP_HD float gelu_derivative(float x) {
  const float c = cut_both(x);
  const float g = gaussian_fp32(c);
  return normal_cdf_fp32(c, g) + c * (g * 0.39894228f);
}

template <Activation kind>
LOWP_HD float activate(float z) {
  float y = z;
  if (kind == Activation::relu) y = relu_fp32(z);
  if (kind == Activation::gelu) y = gelu_fp32(z);
  if (kind == Activation::gelu_tanh) y = gelu_tanh_fp32(z);
  if (kind == Activation::silu) y = silu_fp32(z);
  return canonical_nan(y);
}

template <Activation kind>
LOWP_HD float activation_gradient(float dy, float z) {
  float d = 1.0f;
  if (kind == Activation::relu) d = relu_derivative(z);
  if (kind == Activation::gelu) d = gelu_derivative(z);
  if (kind == Activation::gelu_tanh) d = gelu_tanh_derivative(z);
  if (kind == Activation::silu) d = silu_derivative(z);
  return canonical_nan(dy * d);
}

}  // namespace lowp
