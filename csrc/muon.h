// muon: the momentum of gradients, and the step along the matrix that products make orthogonal.
#pragma once
#include "sgd.h"

namespace lowp {

// What lr is multiplied by: sqrt(max(1, rows / cols)), or 0.2 sqrt(max(rows, cols)).
enum class Adjustment : int { original = 0, match_rms_adamw = 1 };

struct MuonMomentumArgs {
  const SgdTensor* tensors;  // [count]; param: the mean that is orthogonalized, fp32 [rows, cols]
  int64_t count;
  float momentum, one_minus_momentum, inv_scale;
  bool nesterov, maximize;
  Rounding state_rounding;
  uint64_t seed;
  int threads;
};

struct MuonStepArgs {
  const SgdTensor* tensors;  // [count]; grad: the orthogonal matrix, of any float type
  const float* rates;        // [count], lr by the matrix's shape
  int64_t count;
  float decay;  // 1 - lr * weight_decay
  Rounding rounding;
  uint64_t seed;
  int threads;
  const MasterWeight* masters;  // [count] or null
};

}  // namespace lowp

LOWP_CPU_KERNEL(muon_momentum, MuonMomentumArgs)
LOWP_CPU_KERNEL(muon_step, MuonStepArgs)
