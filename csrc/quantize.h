// quantize: a float matrix to int8 codes and fp32 scales.
#pragma once
#include "kernel.h"
#include "numerics/philox.h"

namespace lowp {

struct QuantizeArgs {
  const void* x;  // [rows, cols], contiguous
  Float x_type;
  int64_t rows, cols;
  Granularity granularity;
  int64_t block;  // elements, for Granularity::block
  Rounding rounding;
  PhiloxKey key;
  int64_t offset;  // global index of x's first element, for the draws
  int8_t* codes;   // [rows, cols]
  float* scale;    // tensor [1], row [rows], column [cols], block [rows, ceil(cols/block)]
  int threads;
};

// Both sets of codes that the two products of a backward pass need, in one pass over x.
struct QuantizeRowColArgs {
  const void* x;  // [rows, cols], contiguous
  Float x_type;
  int64_t rows, cols;
  Rounding rounding;
  PhiloxKey row_key, col_key;
  int64_t offset;
  int8_t* row_codes;  // [rows, cols]
  float* row_scale;   // [rows]
  int8_t* col_codes;  // [cols, rows]: transposed
  float* col_scale;   // [cols]
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(quantize, QuantizeArgs)
LOWP_CPU_KERNEL(quantize_row_col, QuantizeRowColArgs)
