// adafactor: means of squares of rows and columns, then an update whose size is cut; one matrix
// after the other.
#pragma once
#include "adamw.h"

namespace lowp {

struct AdafactorTensor {
  void* param;             // [batch, rows, cols], contiguous, like all below
  const void* grad;
  float* row_var;          // [batch, rows, 1], or null for vectors
  float* col_var;          // [batch, 1, cols], or null
  float* variance;         // [cols], or null for matrices; batch and rows are then 1
  int64_t batch, rows, cols;
  int64_t param_type, grad_type;
  int64_t step;            // of the draws
  int64_t id;              // of the draws
  int64_t offset;          // global index of the first element
};

struct AdafactorScalars {
  double one_minus_beta2;  // step^beta2_decay
  double rate;             // min(lr, 1 / sqrt(step))
};

struct AdafactorArgs {
  const AdafactorTensor* tensors;   // [count]
  const AdafactorScalars* scalars;  // [count]
  int64_t count;
  float eps1;
  double eps2, d;
  float decay, inv_scale;           // decay: 1 - lr * weight_decay
  bool maximize;
  Rounding rounding;
  uint64_t seed;
  int threads;
  const MasterWeight* masters;      // [count] or null
};

}  // namespace lowp

LOWP_CPU_KERNEL(adafactor, AdafactorArgs)
