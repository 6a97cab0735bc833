// square_sums: the sum of squares of each tensor in fp64, in one order whatever the threads.
#pragma once
#include "kernel.h"

namespace lowp {

struct FloatTensor {
  const void* data;  // [numel]
  int64_t numel, type;
};

struct SquareSumsArgs {
  const FloatTensor* tensors;  // [count]
  int64_t count;
  double* sums;                // [count]
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(square_sums, SquareSumsArgs)
