// scaled_mm: int8 codes times int8 codes, exact in int32, then scales, bias, activation, one
// rounding.
#pragma once
#include "linear.h"

namespace lowp {

// y = round(activate((float(sum) * row_scale[m]) * col_scale[n] + bias[n]))
struct ScaledMmArgs {
  const int8_t* a;  // element (m, k) at m * a_row_stride + k * a_k_stride; one stride is 1
  int64_t a_row_stride, a_k_stride;
  const int8_t* b;  // element (n, k), alike
  int64_t b_row_stride, b_k_stride;
  int64_t M, N, K;
  const float* row_scale;  // [M], or [1] with row_scale_stride 0
  int64_t row_scale_stride;
  const float* col_scale;  // [N], or [1] with col_scale_stride 0
  int64_t col_scale_stride;
  Epilogue epilogue;
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(scaled_mm, ScaledMmArgs)
