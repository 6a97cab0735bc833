// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11,
// section 3.3), keyed as the project's contract says: one call gives eight 16-bit draws.
#pragma once
#include "numerics/platform.h"

namespace lowp {

constexpr int kPhiloxRounds = 7;
constexpr int kDrawsPerCall = 8;

struct PhiloxKey {
  uint64_t seed;
  uint32_t step;    // applied updates, 1 at the first
  uint32_t tensor;  // crc32 of the qualified name, or the position
  uint32_t role;    // what the draw is for: weight 0, exp_avg 1, exp_avg_sq 2, ...
};

// One round on counter c[4] under the round key (k0, k1).
LOWP_HD void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
  const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
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
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
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

// Draw of one element. For scattered elements; runs of them use philox_fill.
LOWP_HD uint32_t philox_draw(const PhiloxKey& key, uint64_t element) {
  uint32_t w[4];
  philox_group(key, element / kDrawsPerCall, w);
  const uint32_t lane = static_cast<uint32_t>(element % kDrawsPerCall);
  return (w[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu;
}

// Draws of groups first .. first+groups-1 into out[8 * groups], as 16-bit values.
// The loop over groups is the vector loop: sixteen groups at a time fill a 512-bit register.
LOWP_HD void philox_fill(const PhiloxKey& key, uint64_t first, int groups, uint16_t* out) {
  constexpr int kLanes = 16;
  uint32_t words[4][kLanes];
  for (int base = 0; base < groups; base += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t w[4];
      const uint64_t g = first + static_cast<uint64_t>(base + i);
      w[0] = static_cast<uint32_t>(g);
      w[1] = static_cast<uint32_t>((g >> 32) & 0xFFFFu) | (key.role << 16);
      w[2] = key.step;
      w[3] = key.tensor;
      uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 7
      for (int r = 0; r < kPhiloxRounds; ++r) {
        philox_round(w, k0, k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      words[0][i] = w[0];
      words[1][i] = w[1];
      words[2][i] = w[2];
      words[3][i] = w[3];
    }
    const int n = groups - base < kLanes ? groups - base : kLanes;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < 4; ++j) {
        out[(base + i) * 8 + 2 * j] = static_cast<uint16_t>(words[j][i]);
        out[(base + i) * 8 + 2 * j + 1] = static_cast<uint16_t>(words[j][i] >> 16);
      }
    }
  }
}

}  // namespace lowp
