// accumulate: totals += gradients, with one rounding each.
#pragma once
#include "kernel.h"

namespace lowp {

struct AccumulateTensor {
  void* total;             // [numel], like the gradient
  const void* grad;
  int64_t numel;
  int64_t total_type, grad_type;
  int64_t step;            // of the draws
  int64_t id;              // of the draws
  int64_t offset;          // global index of the first element
};

struct AccumulateArgs {
  const AccumulateTensor* tensors;  // [count]
  int64_t count;
  Rounding rounding;
  uint64_t seed;                    // of this addition
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(accumulate, AccumulateArgs)
