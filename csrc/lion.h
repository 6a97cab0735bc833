// lion: one pass over every tensor: unscale, decay, the sign of a mean, one rounding at each store.
#pragma once
#include "sgd.h"

namespace lowp {

struct LionArgs {
  const SgdTensor* tensors;  // [count]; the momentum is never null
  int64_t count;
  float lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, inv_scale;  // as in adamw.h
  bool maximize;
  Rounding rounding, state_rounding;
  uint64_t seed;
  int threads;
  const MasterWeight* masters;  // [count] or null
};

}  // namespace lowp

LOWP_CPU_KERNEL(lion, LionArgs)
