// Products of few rows with many: each sum is a dot product by whole vectors, so neither side is
// packed, and the many are read once, from end to end. How is the parameter Dots:
//   Vector, Sum                   kStep values along k, and the sums of such
//   kFew                          how many of the few rows are multiplied at a time
//   rows()                        how many there are
//   many(n, k), last(n)           a vector of a row of the many, and what is left: zeros behind it
//   few(m, k)                     a vector of a row of the few; anything behind it
//   zero(), add(few, many, sum)   sum += few * many
//   store(sums, out)              out[0 .. kMany) = the sums of the lanes of each
#pragma once
#include <stdlib.h>

#include "cpu/panels.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kMostFew = 17;  // rows of the few, at most
constexpr int kMany = 4;      // rows of the many at a time
constexpr int kChunk = 64;    // rows of the many whose sums are finished together

using ChunkSums = float[kMostFew][kChunk];

// sums[kCount][kMany], rows of which are kChunk apart: of the few from m on and the many from n on.
template <class Dots, int kCount>
static void multiply_dots(const Dots& dots, int64_t n, int m, float* sums) {
  typename Dots::Sum acc[kCount][kMany];
#pragma GCC unroll 6
  for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) acc[j][i] = Dots::zero();
  }
  typename Dots::Vector many[kMany];
  const auto add_all = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) {
      const typename Dots::Vector few = dots.few(m + j, k);
#pragma GCC unroll 4
      for (int i = 0; i < kMany; ++i) Dots::add(few, many[i], acc[j][i]);
    }
  };
  const int64_t whole = dots.K / Dots::kStep * Dots::kStep;
  for (int64_t k = 0; k < whole; k += Dots::kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) many[i] = dots.many(n + i, k);
    add_all(k);
  }
  if (whole < dots.K) {
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) many[i] = dots.last(n + i);
    add_all(whole);
  }
#pragma GCC unroll 6
  for (int j = 0; j < kCount; ++j) Dots::store(acc[j], sums + j * kChunk);
}

template <class Dots, int kCount = Dots::kFew>
static void multiply_dots_of(int count, const Dots& dots, int64_t n, int m, float* sums) {
  if (count == kCount) return multiply_dots<Dots, kCount>(dots, n, m, sums);
  if constexpr (kCount > 1) multiply_dots_of<Dots, kCount - 1>(count, dots, n, m, sums);
}

// Whether rows of both sides lie in one piece, and so few are there that packing would take longer.
static inline bool has_few_rows(const Operand& few, const Operand& many, int64_t most, int64_t M,
                                int64_t N, int64_t K) {
  return M > 0 && M <= most && N >= kChunk && K >= 64 && few.k_stride == 1 && many.k_stride == 1;
}

// finish(n, cols, sums) of all sums of the many rows n ..
template <class Dots, class Finish>
static void multiply_few_rows(const Dots& dots, int64_t N, int threads, const Finish& finish) {
  const int rows = dots.rows(), groups = (rows + Dots::kFew - 1) / Dots::kFew;
  // To read a row of the many costs about as much as to multiply it by three of the few.
  const bool is_shared = (rows + 3) * N * dots.K >= kLeastShared;
  parallel_for(N, kChunk, is_shared ? threads : 1, [&](int64_t begin, int64_t end) {
    ChunkSums sums;
    const int64_t chunk = even_block(end - begin, kChunk, 1);
    for (int64_t n = begin; n < end; n += chunk) {
      const int cols = at_most(end - n, chunk);
      for (int i = 0; i < cols; i += kMany) {
        const int at = at_most(i, cols - kMany);  // the last may overlap
        for (int g = 0; g < groups; ++g) {
          const int m = rows * g / groups, count = rows * (g + 1) / groups - m;
          multiply_dots_of(count, dots, n + at, m, &sums[m][at]);
        }
      }
      finish(n, cols, sums);
    }
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
