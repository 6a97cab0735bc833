// linear, linear_dgrad, linear_wgrad: one matrix product of float operands with fp32 sums, and what
// is done to a sum before it is rounded once.
#pragma once
#include "kernel.h"
#include "numerics/activation.h"

namespace lowp {

// A matrix of which element (i, k) lies at data[i * row_stride + k * k_stride]; one stride is 1.
struct Operand {
  const void* data;
  Float type;
  int64_t row_stride, k_stride;    // elements
  Float rounded_to = Float::fp32;  // before it is multiplied, on a CPU; a wider type: as it is
};

// What follows the sum, all in fp32: y = round(activate(sum + bias)), and backward
// y = round((sum + bias) * the derivative at preact).
struct Epilogue {
  const void* bias;  // [N] or null
  Float bias_type;
  Activation activation;
  void* y;  // [M, N], contiguous
  Float y_type;
  void* preact;  // [M, N]: where sum + bias is stored, or null; backward it is read
  Float preact_type;
  bool backward;
};

struct ProductArgs {
  Operand a;  // [M, K]
  Operand b;  // [N, K]
  int64_t M, N, K;
  Epilogue epilogue;
  int threads;
};

struct EpilogueArgs {
  const float* sums;  // [M, N], contiguous; y may be the same memory if it is fp32
  int64_t M, N;
  Epilogue epilogue;
  int threads;
};

}  // namespace lowp

LOWP_CPU_BF16_KERNEL(product, ProductArgs)
LOWP_CPU_BF16_KERNEL(linear_epilogue, EpilogueArgs)
