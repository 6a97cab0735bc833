// bias_grad: the sums of a matrix's columns.
#pragma once
#include "kernel.h"

namespace lowp {

struct BiasGradArgs {
  const void* dy;  // [M, N], contiguous
  Float dy_type;
  int64_t M, N;
  float* db;  // [N]: over M in fp32, in an order that M alone decides
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(bias_grad, BiasGradArgs)
