// activation_grad: the gradient before an activation, from the one after it.
#pragma once
#include "kernel.h"
#include "numerics/activation.h"

namespace lowp {

struct ActivationGradArgs {
  const void* dy;  // [numel], contiguous
  Float dy_type;
  const void* preact;  // [numel], what the activation was applied to
  Float preact_type;
  int64_t numel;
  Activation activation;
  void* dz;  // [numel], dy's type
  int threads;
};

}  // namespace lowp

LOWP_CPU_KERNEL(activation_grad, ActivationGradArgs)
