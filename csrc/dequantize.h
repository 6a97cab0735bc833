// dequantize: int8 codes and fp32 scales back to a float matrix.
#pragma once
#include "kernel.h"

namespace lowp {

struct DequantizeArgs {
  const int8_t* codes;  // [rows, cols], contiguous
  const float* scale;   // tensor [1], row [rows], column [cols], block [rows, ceil(cols/block)]
  int64_t rows, cols;
  Granularity granularity;
  int64_t block;  // elements, for Granularity::block
  void* y;        // [rows, cols]
  Float y_type;
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(dequantize, DequantizeArgs)
