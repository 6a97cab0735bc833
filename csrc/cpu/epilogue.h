// Rows of fp32 sums -> bias, activation, one rounding. Included in every product's translation
// unit.
#pragma once
#include "cpu/floats.h"
#include "linear.h"

namespace lowp {
namespace LOWP_ISA {

template <Activation kind>
static inline void activate_run(float* z, int n) {
  for (int j = 0; j < n; ++j) z[j] = activate<kind>(z[j]);
}

// z[n], n <= kRun: the sums with their bias added, of elements begin .. begin+n-1 of y;
// overwritten.
static inline void finish_run(float* z, int n, const Epilogue& e, int64_t begin) {
  if (e.preact != nullptr) {
    activate_run<Activation::none>(z, n);
    store_floats(z, n, e.preact_type, e.preact, begin);
  }
  switch (e.activation) {
    case Activation::relu:
      activate_run<Activation::relu>(z, n);
      break;
    case Activation::gelu:
      activate_run<Activation::gelu>(z, n);
      break;
    case Activation::gelu_tanh:
      activate_run<Activation::gelu_tanh>(z, n);
      break;
    case Activation::silu:
      activate_run<Activation::silu>(z, n);
      break;
    default:
      activate_run<Activation::none>(z, n);
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
