// Rows of fp32 sums -> bias, activation or its gradient, one rounding. Included in every product's
// translation unit.
#pragma once
#include "cpu/activations.h"
#include "cpu/floats.h"
#include "cpu/pages.h"
#include "cpu/vector.h"
#include "linear.h"

namespace lowp {
namespace LOWP_ISA {

template <Activation kind>
static inline void activate_run(const float* z, int n, float* y) {
  for (int j = 0; j < n; ++j) y[j] = activate<kind>(z[j]);
}

// dz[n] *= the derivative at elements begin .. begin+n-1 of preact
static inline void multiply_derivative(float* dz, int n, const Epilogue& e, int64_t begin) {
  float z[kRun];
  load_floats(e.preact, e.preact_type, begin, n, z);
  with_activation(e.activation, [&](auto kind) {
    for (int j = 0; j < n; ++j) dz[j] = activation_gradient<decltype(kind)::value>(dz[j], z[j]);
  });
}

// Whether y, of so many elements, is stored past the caches; an sfence must follow. From 32 MB on:
// at 16 MB it gains nothing, and what reads y next may still find it in a cache.
static inline bool goes_around(const Epilogue& e, int64_t numel) {
  return e.y_type == Float::fp32 && !e.backward && numel * 4 >= 2 * kAround;
}

// z[n], n <= kRun: the sums with their bias added, of elements begin .. begin+n-1 of y;
// overwritten.
static inline void finish_run(float* z, int n, const Epilogue& e, int64_t begin,
                              bool around = false) {
  if (e.backward) {
    multiply_derivative(z, n, e, begin);
    return store_floats(z, n, e.y_type, e.y, begin);
  }
  if (e.preact != nullptr) {
    activate_run<Activation::none>(z, n, z);
    store_floats(z, n, e.preact_type, e.preact, begin);
  }
  float* const y = e.y_type == Float::fp32 ? static_cast<float*>(e.y) + begin : z;
  around = around && n % kLanes == 0 && reinterpret_cast<uintptr_t>(y) % sizeof(Vec) == 0;
  float* const to = around ? z : y;
  with_activation(e.activation, [&](auto kind) { activate_run<decltype(kind)::value>(z, n, to); });
  for (int j = 0; around && j < n; j += kLanes) store_around(y + j, load(z + j));
  if (e.y_type != Float::fp32) store_floats(z, n, e.y_type, e.y, begin);
}

// bias[n] of columns column .. column+n-1; -0 where there is none, to which any sum is added as is
static inline void load_bias(const Epilogue& e, int64_t column, int n, float* bias) {
  if (e.bias != nullptr) return load_floats(e.bias, e.bias_type, column, n, bias);
  for (int j = 0; j < n; ++j) bias[j] = -0.0f;
}

}  // namespace LOWP_ISA
}  // namespace lowp
