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
static inline Words count() { return _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0); }
static inline Words add(Words a, Words b) { return _mm512_add_epi64(a, b); }
static inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
static inline Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
static inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
static inline Words pair(Words low, Words high) {
  return _mm512_mask_mov_epi32(low, 0xAAAA, _mm512_slli_epi64(high, 32));
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  const Words first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const Words second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, first, b));
  _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64(a, second, b));
}
#elif defined(__AVX2__)
using Words = __m256i;
static inline Words words(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
static inline Words count() { return _mm256_set_epi64x(3, 2, 1, 0); }
static inline Words add(Words a, Words b) { return _mm256_add_epi64(a, b); }
static inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
static inline Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
static inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
static inline Words pair(Words low, Words high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  const Words even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  _mm256_storeu_si256(reinterpret_cast<Words*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<Words*>(out + 4),
                      _mm256_permute2x128_si256(even, odd, 0x31));
}
#else
using Words = __m128i;
static inline Words words(uint64_t x) { return _mm_set1_epi64x(static_cast<int64_t>(x)); }
static inline Words count() { return _mm_set_epi64x(1, 0); }
static inline Words add(Words a, Words b) { return _mm_add_epi64(a, b); }
static inline Words multiply(Words a, Words b) { return _mm_mul_epu32(a, b); }
static inline Words exclusive_or(Words a, Words b) { return _mm_xor_si128(a, b); }
static inline Words upper(Words a) { return _mm_srli_epi64(a, 32); }
static inline Words pair(Words low, Words high) {
  const Words mask = _mm_set1_epi64x(0xFFFFFFFF);
  return _mm_or_si128(_mm_and_si128(low, mask), _mm_slli_epi64(high, 32));
}
static inline void store_pairs(uint64_t* out, Words a, Words b) {
  _mm_storeu_si128(reinterpret_cast<Words*>(out), _mm_unpacklo_epi64(a, b));
  _mm_storeu_si128(reinterpret_cast<Words*>(out + 2), _mm_unpackhi_epi64(a, b));
}
#endif
constexpr int kGroups = sizeof(Words) / 8;

// The draws of groups first .. first+groups-1, and those that fill up the last vector, in order.
static inline void fill_draws(const PhiloxKey& key, uint64_t first, int groups, uint64_t* out) {
  for (int done = 0; done < groups; done += kGroups, out += 2 * kGroups) {
    const Words g = add(words(first + static_cast<uint64_t>(done)), count());
    Words c0 = g;
    Words c1 = exclusive_or(upper(g), words(uint64_t{key.role} << 16));
    Words c2 = words(key.step), c3 = words(key.tensor);
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 7
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const Words p0 = multiply(c0, words(kPhiloxM0)), p1 = multiply(c2, words(kPhiloxM1));
      c0 = exclusive_or(exclusive_or(upper(p1), c1), words(k0));
      c2 = exclusive_or(exclusive_or(upper(p0), c3), words(k1));
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    store_pairs(out, pair(c0, c1), pair(c2, c3));
  }
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
  union {  // little-endian: the low half of a word is the earlier draw
    uint64_t pairs[2 * kMost];
    uint16_t draws[8 * kMost];
  } buffer_;
};

}  // namespace LOWP_ISA
}  // namespace lowp
