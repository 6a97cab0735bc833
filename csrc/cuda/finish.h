// What follows a product's sum: scales, bias, activation, one rounding. Host and device.
#pragma once
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
  bool aligned;            // every row of y and preact starts at a multiple of 16 bytes
};

static inline bool rows_aligned(const Epilogue& e, int64_t N) {
  return N % 8 == 0 && is_aligned(e.y) && is_aligned(e.preact);
}

template <Activation kind>
LOWP_HD void activate_eight(float* z) {
#pragma unroll
  for (int i = 0; i < 8; ++i) z[i] = activate<kind>(z[i]);
}

// Columns n .. n+7 of row m, of which those beyond N are not there; z: their sums, overwritten.
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
  if (e.preact != nullptr) {
    activate_eight<Activation::none>(z);
    store_floats<8>(z, nullptr, e.preact_type, out, f.aligned, e.preact);
  }
  switch (e.activation) {
    case Activation::relu: activate_eight<Activation::relu>(z); break;
    case Activation::gelu: activate_eight<Activation::gelu>(z); break;
    case Activation::gelu_tanh: activate_eight<Activation::gelu_tanh>(z); break;
    case Activation::silu: activate_eight<Activation::silu>(z); break;
    default: activate_eight<Activation::none>(z);
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
