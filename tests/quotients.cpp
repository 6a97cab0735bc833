// The quotients of cpu/code_pairs.h against IEEE division, for all pairs of mantissas whose
// quotient lies so near to the middle of two floats that the error of a reciprocal could decide.
//
// Let Y be the mantissa of the scale and X that of x, both of 24 bits, and M, odd and of 25 bits,
// that of a middle. X * 2^k = M * Y + t, with k = 24 where X >= Y, else 25, is |t| / Y half ulps
// off it. With y = Y / 2^23 the reciprocal is off by y * 2^-25 of it and q by 1.5 ulps, and the
// remainder by 2^-24 of it: together less than 6 / Y half ulps, so |t| <= 12 is twice what is
// needed. t tells M modulo 2^k, or what of it Y leaves, by the inverse of Y's odd part.
#include <stdio.h>

#include "cpu/code_pairs.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

uint32_t inverse(uint32_t odd) {
  uint32_t x = odd;  // right in 3 bits, and each step doubles them
  for (int i = 0; i < 4; ++i) x *= 2 - odd * x;
  return x;
}

class Trial {
 public:
  // Everything waits until a vector is full, or the scale changes.
  void add(float x, float scale) {
    if (scale != scale_) flush();
    scale_ = scale;
    x_[n_++] = x;
    if (n_ == kLanes) flush();
  }

  void flush() {
    const Vec q = Quotient(scale_)(load(x_));
    for (int i = 0; i < n_; ++i) wrong_ += q[i] != x_[i] / scale_;
    tried_ += n_;
    n_ = 0;
  }

  int64_t tried() const { return tried_; }
  int64_t wrong() const { return wrong_; }

 private:
  float x_[kLanes] = {};
  float scale_ = 1.0f;
  int n_ = 0;
  int64_t tried_ = 0, wrong_ = 0;
};

void try_scale(uint32_t y, int k, Trial& trial) {
  constexpr int kMost = 12;
  constexpr int64_t kLeast = 1 << 23, kEnd = 1 << 24;
  const int zeros = __builtin_ctz(y);
  if (zeros > 3) return;  // then 2^zeros does not divide t
  const uint32_t inverse_y = inverse(y >> zeros);
  const int64_t period = int64_t{1} << (k - zeros);
  for (int64_t t = -kMost; t <= kMost; ++t) {
    if (t == 0 || t % (int64_t{1} << zeros) != 0) continue;
    const uint32_t least = static_cast<uint32_t>(-(t >> zeros)) * inverse_y;
    for (int64_t m = least & (period - 1); m < 2 * kEnd; m += period) {
      const int64_t x = (m * y + t) >> k;
      if (m % 2 == 0 || m < kEnd || x < kLeast || x >= kEnd || (k == 24) != (x >= y)) continue;
      const float scale = static_cast<float>(y) * (k == 24 ? 2.0f : 1.0f);  // x is not beyond it
      trial.add(static_cast<float>(x), scale);
    }
  }
}

}  // namespace
}  // namespace LOWP_ISA
}  // namespace lowp

int main() {
  lowp::LOWP_ISA::Trial trial;
  for (uint32_t y = 1u << 23; y < 1u << 24; ++y) {
    for (int k = 24; k <= 25; ++k) lowp::LOWP_ISA::try_scale(y, k, trial);
  }
  trial.flush();
  printf("%lld %lld\n", static_cast<long long>(trial.tried()),
         static_cast<long long>(trial.wrong()));
}
