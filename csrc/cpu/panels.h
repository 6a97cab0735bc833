// Products by panels: blocks of both operands are packed as 32-bit units along the summed dimension
// (one fp32, two bf16 or int16, four int8 values), and multiplied in register tiles. What a unit
// holds and how two are multiplied is the parameter Math:
//   kValues                             values a unit
//   pack_row(x, at, values, out)        x[at .. at+values) -> units, the last one filled with zeros
//   pack_across(x, at, stride, rows, values, out)   one unit of each of `rows` adjacent rows, of
//   which
//                                       value v lies at x[at + v * stride + row]
//   takes_rows(x, K)                    whether rows of the left side are units where they lie
//   flip()                              bits that are flipped in every unit of the right side
//   Sum, zero, load_sum, store_sum, add, multiply_add(units of a, units of b, sum)
//   kHasOffsets, row_offset(a, units)   what finish() must take off each of a row's sums
//   begin_thread, multiply_column, end_thread   AMX, where it runs (cpu/amx.h)
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <memory>

#include "cpu/parallel.h"
#include "cpu/vector.h"
#include "linear.h"

namespace lowp {
namespace LOWP_ISA {

// A register tile of kRows x kVecs vectors; enough of them to hide the latency of the adds.
constexpr int kVecs = 2;
#if defined(__AVX512F__)
constexpr int kRows = 14;
constexpr int kBlockM = 224;  // a multiple of kRows and of AMX's 32
#else
constexpr int kRows = 6;
constexpr int kBlockM = 168;
#endif
constexpr int kCols = kVecs * kLanes;
constexpr int kBlockN = 512;
constexpr int kDepth = 128;  // units; sums, a panel of a and one of b fit an L2 of 1 MB
constexpr int kHeld = 16;    // panels of b that the blocks of the same columns share
constexpr int64_t kLeastShared = 1 << 22;  // multiplications; fewer are one thread's
constexpr int kRowPad =
    kDepth + kLanes;  // keeps the rows of a panel out of each other's cache sets
constexpr int kLinePad = kBlockM + kLanes;
static_assert(kBlockM % kRows == 0 && kBlockM % kLanes == 0 && kBlockN % kCols == 0,
              "blocks hold whole tiles");

// What one thread works in, up to 5 MB of it. Units and sums are 32 bits wide whatever they hold.
struct alignas(64) Panels {
  float a[kBlockM * kRowPad];        // [kBlockM][kRowPad]
  float b[kHeld][kBlockN * kDepth];  // tiles [kDepth][kCols]
  float sums[kBlockM * kBlockN];     // [kBlockM][kBlockN]
  int64_t held;                      // the first of the columns that b's panels are of, or -1
  float lines[kLanes * kLinePad];    // [kLanes][kLinePad], units that wait to be transposed
};
static_assert(kDepth < kLinePad, "a line holds a unit of every row, or the units of one");

struct Free {
  void operator()(void* p) const { free(p); }
};

// Kept from call to call: the pages of a fresh one cost more than a small product. Zeros at first,
// as tiles are multiplied whole and what malloc leaves beyond a block's edge may be subnormal
// numbers, each of which costs the adders a hundred cycles; calloc's take no memory until used.
static inline Panels* panels_of_thread() {
  static thread_local std::unique_ptr<void, Free> held;
  constexpr size_t kAlign = alignof(Panels);
  if (!held) held.reset(calloc(1, sizeof(Panels) + kAlign));
  const uintptr_t start = reinterpret_cast<uintptr_t>(held.get());
  return reinterpret_cast<Panels*>((start + kAlign - 1) / kAlign * kAlign);
}

static inline int at_most(int64_t n, int64_t limit) {
  return static_cast<int>(n < limit ? n : limit);
}

// n cut into equal pieces of at most `limit`, each but the last a multiple of `tile`.
static inline int64_t even_block(int64_t n, int64_t limit, int64_t tile) {
  const int64_t pieces = n > limit ? (n + limit - 1) / limit : 1;
  return ((n + pieces - 1) / pieces + tile - 1) / tile * tile;
}

struct Shape {
  int64_t height, width;
};

// Of a block: smaller than kBlockM x kBlockN where that spares the busiest thread a sixteenth;
// first narrower, since blocks of the same columns share their panels of b.
static inline Shape block_shape(int64_t M, int64_t N, int64_t threads) {
  constexpr int64_t kLeastHeight = 4 * kRows, kLeastWidth = kBlockN / 4;
  const auto sums_of_busiest = [&](const Shape& s) {
    const int64_t blocks = ((M + s.height - 1) / s.height) * ((N + s.width - 1) / s.width);
    return (blocks + threads - 1) / threads * s.height * s.width;
  };
  const int64_t highest = even_block(M, kBlockM, kRows);
  Shape best{highest, even_block(N, kBlockN, kCols)};
  for (int64_t height = highest; height == highest || height >= kLeastHeight; height -= kRows) {
    for (int64_t limit = kBlockN; limit >= kLeastWidth; limit /= 2) {
      const Shape s{height, even_block(N, limit, kCols)};
      if (sums_of_busiest(s) * 16 <= sums_of_busiest(best) * 15) best = s;
    }
  }
  return best;
}

static inline int64_t element_of(const Operand& x, int64_t row, int64_t k) {
  return row * x.row_stride + k * x.k_stride;
}

// kLanes units from k on of each of `rows` adjacent rows, into out[lane][kLinePad]; zeros beyond.
template <class Math>
static void pack_lanes(const Operand& x, int64_t row, int rows, int64_t k, int64_t last,
                       float* out) {
  for (int lane = 0; lane < kLanes; ++lane, k += Math::kValues, out += kLinePad) {
    const int values = at_most(last - k, Math::kValues);
    if (values > 0) {
      Math::pack_across(x, element_of(x, row, k), x.k_stride, rows, values, out);
    } else {
      memset(out, 0, sizeof(float) * static_cast<size_t>(rows));
    }
  }
}

// Rows m .. m+rows, values k .. last, as to[row][unit]; zeros fill up the last kLanes units.
template <class Math>
static void pack_a(const Operand& x, int64_t m, int rows, int64_t k, int64_t last, float* lines,
                   float* to) {
  const int units = static_cast<int>((last - k + Math::kValues - 1) / Math::kValues);
  const int padded = (units + kLanes - 1) / kLanes * kLanes;
  if (x.k_stride == 1) {
    for (int r = 0; r < rows; ++r) {
      float* out = to + r * kRowPad;
      Math::pack_row(x, element_of(x, m + r, k), static_cast<int>(last - k), out);
      memset(out + units, 0, sizeof(float) * static_cast<size_t>(padded - units));
    }
    return;
  }
  for (int u = 0; u < padded; u += kLanes) {
    pack_lanes<Math>(x, m, rows, k + int64_t{u} * Math::kValues, last, lines);
    for (int r = 0; r < rows; r += kLanes) {
      transpose_square(lines + r, kLinePad, to + r * kRowPad + u, kRowPad);
    }
  }
}

// Rows n .. n+rows, values k .. last, as tiles [unit][kCols]; zeros fill up the last kLanes units.
template <class Math>
static void pack_b(const Operand& x, int64_t n, int rows, int64_t k, int64_t last, float* lines,
                   float* to) {
  const int units = static_cast<int>((last - k + Math::kValues - 1) / Math::kValues);
  const uint32_t flip = Math::flip();
  const int padded = (units + kLanes - 1) / kLanes * kLanes;
  if (x.k_stride != 1) {
    for (int u = 0; u < padded; ++u, k += Math::kValues) {
      const int values = at_most(last - k, Math::kValues);
      for (int c = 0; c < rows; c += kCols) {
        float* out = to + c * kDepth + u * kCols;
        if (values > 0) {
          const int across = at_most(rows - c, kCols);
          Math::pack_across(x, element_of(x, n + c, k), x.k_stride, across, values, out);
          for (int i = 0; i < across; ++i) out[i] = bits_float(float_bits(out[i]) ^ flip);
        } else {
          memset(out, 0, sizeof(float) * kCols);
        }
      }
    }
    return;
  }
  for (int c = 0; c < rows; c += kLanes) {
    for (int r = 0; r < at_most(rows - c, kLanes); ++r) {
      float* line = lines + r * kLinePad;
      Math::pack_row(x, element_of(x, n + c + r, k), static_cast<int>(last - k), line);
      memset(line + units, 0, sizeof(float) * static_cast<size_t>(padded - units));
    }
    float* out = to + c / kCols * kCols * kDepth + c % kCols;
    for (int u = 0; u < padded; u += kLanes) {
      transpose_square(lines + u, kLinePad, out + u * kCols, kCols, flip);
    }
  }
}

// sums[kTall][kCols] (stride kBlockN) = what they were, or 0 at first, + a tile * b tile. The
// product of a panel is summed by itself, so an fp32 error grows with kDepth + K / kDepth, not with
// K. a's rows lie `stride` bytes apart, at any address.
template <class Math, int kTall>
static void multiply_tile(const char* a, int64_t stride, const float* b, int units, bool first,
                          float* sums) {
  constexpr int kBases = (kTall + 2) / 3;  // an address may have a stride in it once or twice
  const char* bases[kBases];
  for (int i = 0; i < kBases; ++i) bases[i] = a + 3 * i * stride;
  typename Math::Sum acc[kTall][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = Math::zero();
    }
  }
  for (int u = 0; u < units; ++u) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + u * kCols + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTall; ++r) {
      const Vec left = broadcast_unit(bases[r / 3] + r % 3 * stride);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Math::multiply_add(left, right[v], acc[r][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) bases[i] += sizeof(float);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTall; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* at = sums + r * kBlockN + v * kLanes;
      Math::store_sum(at, first ? acc[r][v] : Math::add(acc[r][v], Math::load_sum(at)));
    }
  }
}

// p.sums[rows][cols] = a's rows m .. times b's rows n .. over all of K. holds_b: whether b's panels
// are kept, each in a place of its own, for further blocks of the same columns. offsets[rows] +=
// Math::row_offset over all of K, unless they are null.
template <class Math>
static void multiply_block(const Operand& a, const Operand& b, int64_t K, int64_t m, int rows,
                           int64_t n, int cols, bool holds_b, uint32_t* offsets, Panels& p) {
  if (K == 0) memset(p.sums, 0, sizeof p.sums);
  constexpr int64_t kValues = int64_t{kDepth} * Math::kValues;
  const int lying = Math::takes_rows(a, K) ? rows / kRows * kRows : 0;  // the others are packed
  for (int64_t k = 0; k < K; k += kValues) {
    const int64_t last = k + kValues < K ? k + kValues : K;
    const int units = static_cast<int>((last - k + Math::kValues - 1) / Math::kValues);
    float* const packed = p.b[holds_b ? k / kValues : 0];
    if (!holds_b || p.held != n) pack_b<Math>(b, n, cols, k, last, p.lines, packed);
    pack_a<Math>(a, m + lying, rows - lying, k, last, p.lines, p.a + lying * kRowPad);
    const auto stride_of = [&](int r) {
      return r < lying ? a.row_stride : int64_t{kRowPad * sizeof(float)};
    };
    const auto row_of = [&](int r) {
      const void* packed_row = p.a + r * kRowPad;
      return static_cast<const char*>(r < lying ? a.data : packed_row) +
             (r < lying ? element_of(a, m + r, k) : 0);
    };
    for (int r = 0; r < rows && offsets != nullptr; ++r) {
      offsets[r] += Math::row_offset(row_of(r), units);
    }
    for (int c = 0; c < cols; c += kCols) {
      const float* right = packed + c * kDepth;
      if (Math::multiply_column(p.a, right, rows, units, k == 0, p.sums + c)) continue;
      for (int r = 0; r < rows; r += kRows) {
        float* sums = p.sums + r * kBlockN + c;
        if (rows - r > kRows / 2) {
          multiply_tile<Math, kRows>(row_of(r), stride_of(r), right, units, k == 0, sums);
        } else {  // what is left of few rows fits half a tile
          multiply_tile<Math, kRows / 2>(row_of(r), stride_of(r), right, units, k == 0, sums);
        }
      }
    }
  }
  p.held = n;
}

// finish(m, rows, n, cols, sums, offsets) for every block of the product, each once, on some
// thread.
template <class Math, class Finish>
static void multiply(const Operand& a, const Operand& b, int64_t M, int64_t N, int64_t K,
                     int threads, const Finish& finish) {
  if (M == 0 || N == 0) return;
  const Shape block = block_shape(M, N, M * N * K < kLeastShared ? 1 : threads);
  const int64_t height = block.height, width = block.width;
  const int64_t down = (M + height - 1) / height, across = (N + width - 1) / width;
  const bool holds_b = down > 1 && K <= int64_t{kHeld} * kDepth * Math::kValues;
  parallel_for(down * across, 1, threads, [&](int64_t begin, int64_t end) {
    Panels* p = panels_of_thread();
    Math::begin_thread();
    p->held = -1;
    const std::unique_ptr<uint32_t, Free> offsets(
        Math::kHasOffsets ? static_cast<uint32_t*>(calloc(down * height, sizeof(uint32_t)))
                          : nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % down * height, n = i / down * width;
      const int rows = at_most(M - m, height), cols = at_most(N - n, width);
      uint32_t* const offset = Math::kHasOffsets ? offsets.get() + m : nullptr;
      const bool is_first = i - begin < down;  // of the blocks of these rows
      multiply_block<Math>(a, b, K, m, rows, n, cols, holds_b, is_first ? offset : nullptr, *p);
      finish(m, rows, n, cols, p->sums, offset);
    }
    Math::end_thread();
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
