// What follows a product's sum: scales, bias, activation or its gradient, one rounding. Host and
// device.
#pragma once
#include <type_traits>

#include "cuda/vectors.h"
#include "linear.h"
#include "numerics/activation.h"

namespace lowp {
namespace cuda {

struct Finish {
  Epilogue epilogue;
  int64_t N;
  const float* row_scale;  // [M], or [1] with stride 0; null for a float product
  int64_t row_scale_stride;
  const float* col_scale;  // [N], or [1] with stride 0
  int64_t col_scale_stride;
  bool aligned;  // every row of y and preact starts at a multiple of 16 bytes
};

static inline bool rows_aligned(const Epilogue& e, int64_t N) {
  return N % 8 == 0 && is_aligned(e.y) && is_aligned(e.preact);
}

template <Activation kind>
LOWP_HD void activate_eight(float* z) {
#pragma unroll
  for (int i = 0; i < 8; ++i) z[i] = activate<kind>(z[i]);
}

// Half of them at a time, turned through the same registers: beside a product's sums there is no
// room for what all eight need at once.
template <Activation kind>
LOWP_HD void gradient_eight(float* dz, float* z) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float done = activation_gradient<kind>(dz[i], z[i]);
      dz[i] = dz[i + 4];
      z[i] = z[i + 4];
      dz[i + 4] = done;
    }
  }
}

// dz *= the derivative at the elements of preact in the span
LOWP_HD void multiply_derivative(const Epilogue& e, const Span& s, bool aligned, float* dz) {
  float z[8];
  load_floats<8>(e.preact, e.preact_type, s, aligned, z);
  switch (e.activation) {
    case Activation::relu:
      return gradient_eight<Activation::relu>(dz, z);
    case Activation::gelu:
      return gradient_eight<Activation::gelu>(dz, z);
    case Activation::gelu_tanh:
      return gradient_eight<Activation::gelu_tanh>(dz, z);
    case Activation::silu:
      return gradient_eight<Activation::silu>(dz, z);
    default:
      return gradient_eight<Activation::none>(dz, z);
  }
}

LOWP_HD void activate_all(Activation activation, float* z) {
  switch (activation) {
    case Activation::relu:
      return activate_eight<Activation::relu>(z);
    case Activation::gelu:
      return activate_eight<Activation::gelu>(z);
    case Activation::gelu_tanh:
      return activate_eight<Activation::gelu_tanh>(z);
    case Activation::silu:
      return activate_eight<Activation::silu>(z);
    default:
      return activate_eight<Activation::none>(z);
  }
}

// Columns n .. n+7 of row m, of which those beyond N are not there; z: their sums, overwritten.
// Sum: what they were summed in; sums of codes have no gradient behind them.
template <class Sum>
LOWP_HD void finish_eight(const Finish& f, int64_t m, int64_t n, float* z) {
  const Epilogue& e = f.epilogue;
  const Span columns = span_of<8>(n, 0, f.N);
  if (columns.to == 0) return;
  if (f.row_scale != nullptr) {
    const float row_scale = f.row_scale[m * f.row_scale_stride];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = columns.holds(i) ? f.col_scale[(n + i) * f.col_scale_stride] : 0.0f;
      z[i] = (z[i] * row_scale) * scale;
    }
  }
  if (e.bias != nullptr) {
    float bias[8];
    load_floats<8>(e.bias, e.bias_type, columns, false, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = z[i] + bias[i];
  }
  const Span out{m * f.N + n, columns.from, columns.to};
  if (std::is_same<Sum, float>::value && e.backward) {
    multiply_derivative(e, out, f.aligned, z);
  } else {
    if (e.preact != nullptr) {
      activate_eight<Activation::none>(z);
      store_floats<8>(z, nullptr, e.preact_type, out, f.aligned, e.preact);
    }
    activate_all(e.activation, z);
  }
  store_floats<8>(z, nullptr, e.y_type, out, f.aligned, e.y);
}

// A quad of lanes holds eight columns of four groups as mma leaves them: lane q has columns 2q,
// 2q+1 of each, pairs[group]. After it, lane q has all eight columns of group q. swap(value,
// lanes): the value of the lane whose number differs in the bits of `lanes`.
template <class Value, class Swap>
LOWP_HD void gather_groups(Value (&pairs)[4][2], int q, const Swap& swap) {
#pragma unroll
  for (int bit = 2; bit > 0; bit /= 2) {
    const bool high = (q & bit) != 0;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (g & bit) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Value& low_group = pairs[g][i];
        Value& high_group = pairs[g | bit][i];
        const Value got = swap(high ? low_group : high_group, bit);
        if (high) {
          low_group = got;
        } else {
          high_group = got;
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace lowp
