// sgd: one pass over every tensor: unscale, decay, momentum, update, one rounding at each store.
#pragma once
#include "adamw.h"

namespace lowp {

struct SgdTensor {
  void* param;             // [rows, cols], contiguous, like all below
  const void* grad;
  void* momentum;          // floats, or int8 codes with one scale a block of 256 along cols; or null
  float* momentum_scale;   // [rows, ceil(cols / 256)] or null
  int64_t rows, cols;
  int64_t param_type, grad_type, state_type;
  int64_t step;            // of the draws; at 1 the momentum starts as the gradient
  int64_t id;              // of the draws
  int64_t offset;          // global index of the first element
};

struct SgdArgs {
  const SgdTensor* tensors;  // [count]
  int64_t count;
  float lr, momentum, one_minus_dampening, weight_decay, inv_scale;
  bool nesterov, maximize;
  Rounding rounding, state_rounding;
  uint64_t seed;
  int threads;
  const MasterWeight* masters;  // [count] or null
};

}  // namespace lowp

LOWP_CPU_KERNEL(sgd, SgdArgs)
