// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11,
// section 3.3), keyed as the project's contract says: one call gives eight 16-bit draws.
#pragma once
#include "numerics/platform.h"

namespace lowp {

constexpr int kPhiloxRounds = 7;
constexpr int kDrawsPerCall = 8;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // steps of the key

struct PhiloxKey {
  uint64_t seed;
  uint32_t step;    // applied updates, 1 at the first
  uint32_t tensor;  // crc32 of the qualified name, or the position
  uint32_t role;    // what the draw is for: weight 0, exp_avg 1, exp_avg_sq 2, ...
};

// One round on counter c[4] under the round key (k0, k1).
LOWP_HD void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{kPhiloxM0} * c[0];
  const uint64_t p1 = uint64_t{kPhiloxM1} * c[2];
  const uint32_t c1 = c[1], c3 = c[3];
  c[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c[1] = static_cast<uint32_t>(p1);
  c[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c[3] = static_cast<uint32_t>(p0);
}

// The raw generator: counter c[4] becomes the output, rounds times.
LOWP_HD void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    philox_round(c, k0, k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The four output words of group g, which hold draws 8g .. 8g+7, low half first.
LOWP_HD void philox_group(const PhiloxKey& key, uint64_t g, uint32_t out[4]) {
  out[0] = static_cast<uint32_t>(g);
  out[1] = static_cast<uint32_t>((g >> 32) & 0xFFFFu) | (key.role << 16);
  out[2] = key.step;
  out[3] = key.tensor;
  philox4x32(out, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32),
             kPhiloxRounds);
}

// Draw of one element. Runs of elements use cpu/draws.h.
LOWP_HD uint32_t philox_draw(const PhiloxKey& key, uint64_t element) {
  uint32_t w[4];
  philox_group(key, element / kDrawsPerCall, w);
  const uint32_t lane = static_cast<uint32_t>(element % kDrawsPerCall);
  return (w[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu;
}

}  // namespace lowp
