// Sums in fp64 whose order is a part of their definition: 16 lanes, each in order, then lane i + 8
// to lane i, i + 4 to i, i + 2 to i and 1 to 0. Included inside every instruction set's translation
// unit.
#pragma once
#include "kernel.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kLanes = 16;

static inline double lane_sum(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// lanes[i % 16] += x[i]^2, i < n; x starts at a multiple of 16 of its sum
static inline void add_squares(const float* x, int n, double* __restrict lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double d = x[i + j];
      lanes[j] += d * d;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const double d = x[i + j];
    lanes[j] += d * d;
  }
}

static inline double square_sum(const float* x, int n) {
  double lanes[kLanes] = {};
  add_squares(x, n, lanes);
  return lane_sum(lanes);
}

}  // namespace LOWP_ISA
}  // namespace lowp
