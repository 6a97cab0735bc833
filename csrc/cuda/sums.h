// Sums of squares in fp64 whose order is a part of their definition
// (lowp/reference/square_sums.py): 16 lanes, each in order, then lane i + 8 to lane i, i + 4 to i,
// i + 2 to i and 1 to 0. One thread has all 16, so that it reads whole vectors and no order depends
// on others.
#pragma once
#include "cuda/states.h"

namespace lowp {
namespace cuda {

constexpr int kSumLanes = 16;
constexpr int64_t kSumRun = 1024;

// lanes[i] += x[i]^2; what a span does not hold is 0 there and changes no sum.
LOWP_HD void add_squares(const float* x, double* lanes) {
#pragma unroll
  for (int i = 0; i < kSumLanes; ++i) {
    const double d = x[i];
    lanes[i] = lanes[i] + d * d;
  }
}

template <int kHalf>
LOWP_HD void fold(double* lanes) {
#pragma unroll
  for (int i = 0; i < kHalf; ++i) lanes[i] = lanes[i] + lanes[i + kHalf];
}

LOWP_HD double lane_sum(double* lanes) {
  fold<8>(lanes);
  fold<4>(lanes);
  fold<2>(lanes);
  fold<1>(lanes);
  return lanes[0];
}

// The sum of a tensor's runs, one after the other.
LOWP_HD double run_sum(const double* partial, int64_t first, int64_t last) {
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = first; i < last; ++i) total = total + partial[i];
  return total;
}

}  // namespace cuda
}  // namespace lowp
