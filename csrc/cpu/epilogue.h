// Rows of fp32 sums -> bias, activation or its gradient, one rounding. Included in every product's
// translation unit.
#pragma once
#include "cpu/activations.h"
#include "cpu/floats.h"
#include "linear.h"

namespace lowp {
namespace LOWP_ISA {

template <Activation kind>
static inline void activate_run(float* z, int n) {
  for (int j = 0; j < n; ++j) z[j] = activate<kind>(z[j]);
}

// dz[n] *= the derivative at elements begin .. begin+n-1 of preact
static inline void multiply_derivative(float* dz, int n, const Epilogue& e, int64_t begin) {
  float z[kRun];
  load_floats(e.preact, e.preact_type, begin, n, z);
  with_activation(e.activation, [&](auto kind) {
    for (int j = 0; j < n; ++j) dz[j] = activation_gradient<decltype(kind)::value>(dz[j], z[j]);
  });
}

// z[n], n <= kRun: the sums with their bias added, of elements begin .. begin+n-1 of y;
// overwritten.
static inline void finish_run(float* z, int n, const Epilogue& e, int64_t begin) {
  if (e.backward) {
    multiply_derivative(z, n, e, begin);
  } else {
    if (e.preact != nullptr) {
      activate_run<Activation::none>(z, n);
      store_floats(z, n, e.preact_type, e.preact, begin);
    }
    with_activation(e.activation, [&](auto kind) { activate_run<decltype(kind)::value>(z, n); });
  }
  store_floats(z, n, e.y_type, e.y, begin);
}

// z[j] += bias[column + j]; nothing without a bias, so that -0 stays
static inline void add_bias(const Epilogue& e, int64_t column, int n, float* z) {
  if (e.bias == nullptr) return;
  float bias[kRun];
  load_floats(e.bias, e.bias_type, column, n, bias);
  for (int j = 0; j < n; ++j) z[j] += bias[j];
}

}  // namespace LOWP_ISA
}  // namespace lowp
