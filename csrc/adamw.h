// adamw: one pass over every tensor: unscale, decay, moments, update, one rounding at each store;
// and Adam, whose decay is a part of the gradient.
#pragma once
#include "kernel.h"
#include "numerics/philox.h"

namespace lowp {

enum class State : int { fp32 = 0, bf16 = 1, fp16 = 2, codes = 3 };  // the first three as Float

// One tensor as a row of the table that Python fills: 64-bit words, then its floats in another table.
struct AdamWTensor {
  void* param;             // [rows, cols], contiguous, like all below
  const void* grad;
  void* exp_avg;           // floats, or int8 codes with one scale a block of 256 along cols
  void* exp_avg_sq;        // floats, or uint8 codes of its square root, alike
  float* exp_avg_scale;    // [rows, ceil(cols / 256)] or null
  float* exp_avg_sq_scale;
  void* max_exp_avg_sq;    // floats, or null without amsgrad
  int64_t rows, cols;
  int64_t param_type, grad_type, state_type, max_type;
  int64_t step;            // of the draws
  int64_t id;              // of the draws
  int64_t offset;          // global index of the first element
};

struct AdamWScalars {      // one a tensor, as steps may differ
  float step_size;         // lr / (1 - beta1^step)
  float inv_sqrt_bc2;      // 1 / sqrt(1 - beta2^step)
};

// What a 16-bit weight lacks, kept beside it.
enum class Master : int { none = 0, remainder = 1, kahan = 2 };

struct MasterWeight {
  void* data;              // like the param: its 16 low bits, or in its type what its rounding lost
  int64_t kind;
};

struct AdamWArgs {
  const AdamWTensor* tensors;   // [count]
  const AdamWScalars* scalars;  // [count]
  int64_t count;
  float one_minus_beta1, one_minus_beta2, eps, decay, inv_scale;  // decay: 1 - lr * weight_decay
  bool maximize;
  Rounding rounding, state_rounding;
  uint64_t seed;
  int threads;
  float coupled_decay;          // added to the gradient as a multiple of the weight (Adam); else 0
  const MasterWeight* masters;  // [count] or null
};

}  // namespace lowp

LOWP_CPU_KERNEL(adamw, AdamWArgs)
