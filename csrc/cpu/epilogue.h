// Rows of fp32 sums -> bias, activation or its gradient, one rounding. Included in every product's
// translation unit.
#pragma once
#include "cpu/floats.h"
#include "linear.h"

namespace lowp {
namespace LOWP_ISA {

template <Activation kind>
static inline void activate_run(float* z, int n) {
  for (int j = 0; j < n; ++j) z[j] = activate<kind>(z[j]);
}

template <Activation kind>
static inline void gradient_run(float* dz, const float* z, int n) {
  for (int j = 0; j < n; ++j) dz[j] = activation_gradient<kind>(dz[j], z[j]);
}

// dz[n] *= the derivative at elements begin .. begin+n-1 of preact
static inline void multiply_derivative(float* dz, int n, const Epilogue& e, int64_t begin) {
  float z[kRun];
  load_floats(e.preact, e.preact_type, begin, n, z);
  switch (e.activation) {
    case Activation::relu:
      return gradient_run<Activation::relu>(dz, z, n);
    case Activation::gelu:
      return gradient_run<Activation::gelu>(dz, z, n);
    case Activation::gelu_tanh:
      return gradient_run<Activation::gelu_tanh>(dz, z, n);
    case Activation::silu:
      return gradient_run<Activation::silu>(dz, z, n);
    default:
      return gradient_run<Activation::none>(dz, z, n);
  }
}

static inline void activate_all(float* z, int n, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return activate_run<Activation::relu>(z, n);
    case Activation::gelu:
      return activate_run<Activation::gelu>(z, n);
    case Activation::gelu_tanh:
      return activate_run<Activation::gelu_tanh>(z, n);
    case Activation::silu:
      return activate_run<Activation::silu>(z, n);
    default:
      return activate_run<Activation::none>(z, n);
  }
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
    activate_all(z, n, e.activation);
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
