// The draws of runs of elements: Philox by vectors of 64-bit lanes, whose multiplication of low
// halves is just the one that a round needs. Included inside every instruction set's translation
// unit.
#pragma once
#include <immintrin.h>

#include "cpu/floats.h"
#include "numerics/philox.h"

namespace lowp {
namespace LOWP_ISA {

#if defined(__AVX512F__)
using Words = __m512i;  // one 32-bit word of 8 groups; the upper halves of the lanes mean nothing
static inline Words words(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
static inline Words order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
static inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
static inline Words upper(Words a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
static inline Words exclusive_or(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
static inline Words output(Words p, Words c, Words k) {
  return _mm512_mask_ternarylogic_epi32(_mm512_shuffle_epi32(p, _MM_PERM_CDAB), 0x5555, c, k, 0x96);
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(out + 8, _mm512_unpackhi_epi64(a, b));
}
#elif defined(__AVX2__)
using Words = __m256i;
static inline Words words(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
static inline Words order() { return _mm256_set_epi64x(3, 1, 2, 0); }
static inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
static inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
static inline Words exclusive_or(Words a, Words b, Words c) { return a ^ b ^ c; }
static inline Words output(Words p, Words c, Words k) {
  return _mm256_shuffle_epi32(p, 0xB1) ^ ((c ^ k) & words(0xFFFFFFFFu));
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  _mm256_storeu_si256(reinterpret_cast<Words*>(out), _mm256_unpacklo_epi64(a, b));
  _mm256_storeu_si256(reinterpret_cast<Words*>(out + 4), _mm256_unpackhi_epi64(a, b));
}
#else
using Words = __m128i;
static inline Words words(uint64_t x) { return _mm_set1_epi64x(static_cast<int64_t>(x)); }
static inline Words order() { return _mm_set_epi64x(1, 0); }
static inline Words multiply(Words a, Words b) { return _mm_mul_epu32(a, b); }
static inline Words upper(Words a) { return _mm_srli_epi64(a, 32); }
static inline Words exclusive_or(Words a, Words b, Words c) { return a ^ b ^ c; }
static inline Words output(Words p, Words c, Words k) {
  return _mm_shuffle_epi32(p, 0xB1) ^ ((c ^ k) & words(0xFFFFFFFFu));
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  _mm_storeu_si128(reinterpret_cast<Words*>(out), _mm_unpacklo_epi64(a, b));
  _mm_storeu_si128(reinterpret_cast<Words*>(out + 2), _mm_unpackhi_epi64(a, b));
}
#endif
constexpr int kGroups = sizeof(Words) / 8;  // in the order that store_pairs puts right

static inline uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }
static inline uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// The draws of groups first, first+1, ... in kRoles consecutive roles from key.role on, kGroups of
// them at a time; the high word of the group may not change.
//
// Of a counter only the low word of the group differs between the groups, and only the second word
// between the roles. So the first two rounds are one product each for all roles, and half of the
// third is.
template <int kRoles>
class Generator {
 public:
  Generator(const PhiloxKey& key, uint64_t first) {
    seek(first);
    uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
    for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
      k0[r] = low_word(key.seed) + r * kPhiloxW0;
      k1[r] = high_word(key.seed) + r * kPhiloxW1;
      k0_[r] = words(k0[r]);
      k1_[r] = words(k1[r]);
    }
    const uint64_t of_step = uint64_t{kPhiloxM1} * key.step;
    k1_[0] = words(key.tensor ^ k1[0]);
    k0_[1] = words(low_word(of_step) ^ k0[1]);
    for (uint32_t i = 0; i < kRoles; ++i) {
      const uint32_t c1 = (high_word(first) & 0xFFFFu) | ((key.role + i) << 16);
      const uint64_t p = uint64_t{kPhiloxM0} * (high_word(of_step) ^ c1 ^ k0[0]);
      second_[i] = words(high_word(p) ^ k1[1]);
      third_[i] = words(low_word(p) ^ k1[2]);
    }
  }

  void seek(uint64_t first) { product_ = multiply(words(first) + order(), words(kPhiloxM0)); }

  // A role's draws begin `stride` words behind the last's.
  __attribute__((always_inline)) void next(uint64_t* out, int64_t stride) {
    const Words m0 = words(kPhiloxM0), m1 = words(kPhiloxM1);
    const Words a = product_;
    const Words b = multiply(upper(a) ^ k1_[0], m1);
    const Words c = multiply(upper(b) ^ k0_[1], m0);
    product_ += words(uint64_t{kGroups} * kPhiloxM0);
#pragma GCC unroll 4
    for (int i = 0; i < kRoles; ++i) {
      Words p0 = c, p1 = multiply(a ^ second_[i], m1), c1 = p1, c3 = p0;
      Words c0 = exclusive_or(upper(p1), b, k0_[2]), c2 = upper(p0) ^ third_[i];
      constexpr int kLast = kPhiloxRounds - 1;
#pragma GCC unroll 4
      for (int r = 3; r < kLast; ++r) {
        p0 = multiply(c0, m0);
        p1 = multiply(c2, m1);
        c0 = exclusive_or(upper(p1), c1, k0_[r]);
        c2 = exclusive_or(upper(p0), c3, k1_[r]);
        c1 = p1;
        c3 = p0;
      }
      p0 = multiply(c0, m0);
      p1 = multiply(c2, m1);
      store_pairs(out + i * stride, output(p1, c1, k0_[kLast]), output(p0, c3, k1_[kLast]));
    }
  }

 private:
  Words product_;                                // of the groups and the first round's multiplier
  Words k0_[kPhiloxRounds], k1_[kPhiloxRounds];  // round keys, and what else a round adds
  Words second_[kRoles], third_[kRoles];         // word 2 in rounds 2 and 3
};

// Whether the high word of their groups is one for all elements begin .. end-1.
static inline bool in_one_stretch(int64_t begin, int64_t end) {
  constexpr int64_t kElements = int64_t{kDrawsPerCall} << 32;
  return begin / kElements == (end - 1) / kElements;
}

// The draws of groups first .. first+groups-1, and those that fill up the last vector, in order.
static inline void fill_draws(const PhiloxKey& key, uint64_t first, int groups, uint64_t* out) {
  const uint64_t left = (uint64_t{1} << 32) - low_word(first);
  if (left < static_cast<uint64_t>(groups)) {
    fill_draws(key, first, static_cast<int>(left), out);
    return fill_draws(key, first + left, groups - static_cast<int>(left), out + 2 * left);
  }
  Generator<1> generator(key, first);
  for (int done = 0; done < groups; done += kGroups) generator.next(out + 2 * done, 0);
}

// Draws of the n <= kRun elements that start at global index `element`.
class Draws {
 public:
  const uint16_t* fill(const PhiloxKey& key, int64_t element, int n) {
    const int skip = static_cast<int>(element % kDrawsPerCall);
    fill_draws(key, static_cast<uint64_t>(element / kDrawsPerCall),
               (skip + n + kDrawsPerCall - 1) / kDrawsPerCall, buffer_.pairs);
    return buffer_.draws + skip;
  }

 private:
  static constexpr int kMost = kRun / kDrawsPerCall + 1 + kGroups;  // groups
  alignas(64) union {  // little-endian: the low half of a word is the earlier draw
    uint64_t pairs[2 * kMost];
    uint16_t draws[8 * kMost];
  } buffer_;
};

constexpr int kDrawnStep = kGroups * kDrawsPerCall;

// Draws of consecutive elements in kRoles consecutive roles from key.role on, kDrawnStep of them at
// a time, to be made just before they are used; all elements in one stretch.
template <int kRoles>
class DrawStream {
 public:
  DrawStream(const PhiloxKey& key, int64_t element)
      : generator_(key, group_of(element)), next_(element - 1) {
    start(element);
  }

  // What comes next, where it is not what follows anyway.
  void start(int64_t element) {
    if (element == next_) return;
    next_ = element;
    skip_ = element % kDrawsPerCall;
    generator_.seek(group_of(element));
    generator_.next(buffer_.pairs + kDrawnStep / 4, kStride);
  }

  // Makes the draws of the next elements, one step ahead: those of a step may begin within a group,
  // and nothing should wait for them.
  __attribute__((always_inline)) void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < kRoles; ++i) {
      uint64_t* const role = buffer_.pairs + i * kStride;
      memcpy(role, role + kDrawnStep / 4, 2 * kDrawnStep);
    }
    generator_.next(buffer_.pairs + kDrawnStep / 4, kStride);
    next_ += kDrawnStep;
  }

  const uint16_t* of(int role, int i) const {
    return buffer_.draws + 4 * kStride * role + skip_ + i;
  }

 private:
  static uint64_t group_of(int64_t element) {
    return static_cast<uint64_t>(element / kDrawsPerCall);
  }

  static constexpr int64_t kStride = 2 * kDrawnStep / 4;
  Generator<kRoles> generator_;
  int64_t next_, skip_;
  alignas(64) union {  // little-endian: the low half of a word is the earlier draw
    uint64_t pairs[kRoles * kStride];
    uint16_t draws[kRoles * 4 * kStride];
  } buffer_;
};

template <>
class DrawStream<0> {
 public:
  DrawStream(const PhiloxKey&, int64_t) {}
  void start(int64_t) {}
  void advance() {}
  const uint16_t* of(int, int) const { return nullptr; }
};

}  // namespace LOWP_ISA
}  // namespace lowp
