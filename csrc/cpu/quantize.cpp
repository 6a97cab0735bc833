#include "quantize.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/codes.h"
#include "cpu/draws.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/vector.h"
#include "numerics/scale.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it brings

int64_t rows_of_grain(int64_t cols) { return cols >= kGrain ? 1 : kGrain / (cols > 0 ? cols : 1); }

int run_length(int64_t begin, int64_t end) {
  return static_cast<int>(end - begin < kRun ? end - begin : kRun);
}

constexpr int64_t kFetched =
    1 << 18;  // bytes of a row that the second level of caches has room for

// x, its rounding and where its draws begin: what codes are made of.
template <class Element>
struct Source {
  const typename Element::Stored* x;
  Rounding rounding;
  PhiloxKey key;
  int64_t offset;
  bool around;  // whether codes go past the caches

  // Codes of x[begin .. begin+n), n <= kRun, which share inv_scale or have one each.
  template <int kStride>
  void encode(int64_t begin, int n, const float* inv_scale, int8_t* codes, Draws& draws) const {
    const bool past = around && reinterpret_cast<uintptr_t>(codes) % 64 == 0;
    if (rounding == Rounding::nearest) {
      codes_rn<Element, kStride>(x + begin, inv_scale, n, codes, past);
    } else {
      codes_sr<Element, kStride>(x + begin, inv_scale, draws.fill(key, offset + begin, n), n, codes,
                                 past);
    }
  }

  // Codes of x[begin .. end), which share a scale. The next groups, of elements before `stop`, are
  // fetched meanwhile: else the memory is idle while a group is read for the second time.
  void encode_group(int64_t begin, int64_t end, int64_t stop, float inv_scale, int8_t* codes,
                    Draws& draws) const {
    if (begin == end) return;  // and codes may be null
    if (inv_scale == 0.0f) {
      memset(codes + begin, 0, static_cast<size_t>(end - begin));
      return;
    }
    const int64_t group = end - begin, ahead = group < kRun ? kRun : group;
    const bool fetches = ahead <= kFetched / static_cast<int64_t>(sizeof(*x));
    for (int64_t i = begin; i < end; i += kRun) {
      const int n = run_length(i, end);
      if (fetches && i + ahead + n <= stop) fetch(x + i + ahead, n);
      encode<0>(i, n, &inv_scale, codes + i, draws);
    }
  }

  // Into the first level where the codes are all there is to do, else into the second, whose queue
  // is longer: each is 8 % quicker than the other where it is used.
  void fetch(const typename Element::Stored* p, int n) const {
    constexpr int kLine = 64 / sizeof(*p);
    for (int i = 0; i < n; i += kLine) {
      const char* const line = reinterpret_cast<const char*>(p + i);
      if (rounding == Rounding::nearest) {
        _mm_prefetch(line, _MM_HINT_T0);
      } else {
        _mm_prefetch(line, _MM_HINT_T1);
      }
    }
  }

  // After a thread's last codes: others may read them.
  void settle() const {
    if (around) _mm_sfence();
  }
};

template <class Element>
Source<Element> source_of(const QuantizeArgs& a) {
  return {static_cast<const typename Element::Stored*>(a.x), a.rounding, a.key, a.offset,
          a.rows * a.cols >= kAround};
}

template <class Element>
void quantize_tensor(const QuantizeArgs& a) {
  const Source<Element> source = source_of<Element>(a);
  const int64_t numel = a.rows * a.cols;
  typename Element::Magnitude amax = 0;
  parallel_for(numel, kGrain, a.threads, [&](int64_t begin, int64_t end) {
    const auto mine = amax_of<Element>(source.x + begin, end - begin);
#pragma omp critical(lowp_amax)
    amax = mine > amax ? mine : amax;
  });
  const Scale s = scale_of(Element::fp32_bits(amax));
  *a.scale = s.scale;
  parallel_for(numel, kGrain, a.threads, [&](int64_t begin, int64_t end) {
    Draws draws;
    source.encode_group(begin, end, end, s.inv_scale, a.codes, draws);
    source.settle();
  });
}

template <class Element>
void quantize_rows(const QuantizeArgs& a) {
  const Source<Element> source = source_of<Element>(a);
  const int64_t block = a.granularity == Granularity::row ? a.cols : a.block;
  const int64_t blocks = a.granularity == Granularity::row ? 1 : (a.cols + block - 1) / block;
  const FreshPages pages(a.codes, a.rows * a.cols);
  parallel_for(a.rows, rows_of_grain(a.cols), a.threads, [&](int64_t begin, int64_t end) {
    pages.map(begin * a.cols, end * a.cols);
    Draws draws;
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = r * a.cols + b * block;
        const int64_t last = b + 1 < blocks ? first + block : (r + 1) * a.cols;
        const Scale s =
            scale_of(Element::fp32_bits(amax_of<Element>(source.x + first, last - first)));
        a.scale[r * blocks + b] = s.scale;
        source.encode_group(first, last, end * a.cols, s.inv_scale, a.codes, draws);
      }
    }
    source.settle();
  });
}

// Threads share out the columns; a run of them is read for its amax and again for its codes.
template <class Element>
void quantize_columns(const QuantizeArgs& a) {
  const Source<Element> source = source_of<Element>(a);
  const int64_t grain = rows_of_grain(a.rows) > 64 ? rows_of_grain(a.rows) : 64;
  parallel_for(a.cols, grain, a.threads, [&](int64_t begin, int64_t end) {
    float inv_scale[kRun];
    typename Element::Magnitude amax[kRun];
    Draws draws;
    for (int64_t c = begin; c < end; c += kRun) {
      const int n = run_length(c, end);
      memset(amax, 0, sizeof amax);
      for (int64_t r = 0; r < a.rows; ++r) max_into<Element>(source.x + r * a.cols + c, n, amax);
      for (int i = 0; i < n; ++i) {
        const Scale s = scale_of(Element::fp32_bits(amax[i]));
        a.scale[c + i] = s.scale;
        inv_scale[i] = s.inv_scale;
      }
      for (int64_t r = 0; r < a.rows; ++r) {
        const int64_t first = r * a.cols + c;
        source.template encode<1>(first, n, inv_scale, a.codes + first, draws);
      }
    }
    source.settle();
  });
}

constexpr int kTileRows = 128, kTileCols = 128;
constexpr int kCopied = 64;    // bytes: a copy of a known size is one register's
constexpr int kRowsAhead = 8;  // a tile's rows lie apart, where no cache fetches by itself

// Codes of the rows and columns of one tile, turned by units of 4 rows. Squares of kLanes units and
// columns are turned whole, with whatever the lines hold where x has no element.
struct Tile {
  uint8_t lines[4][kTileCols] = {};
  float quads[kTileRows / 4][kTileCols];  // a unit: the codes of 4 rows of a column
  float turned[kTileCols][kTileRows / 4];

  // encode(row, codes): one row's codes
  template <class Encode>
  void fill(int rows, int cols, const Encode& encode) {
    for (int r = 0; r < squares_of(rows, 4 * kLanes); r += 4) {
      for (int i = 0; i < 4 && r + i < rows; ++i) {
        encode(r + i, reinterpret_cast<int8_t*>(lines[i]));
      }
      interleave_bytes(lines[0], kTileCols, squares_of(cols, kLanes), quads[r / 4]);
    }
  }

  void write(int8_t* out, int64_t stride, int rows, int cols) {
    for (int r = 0; r < (rows + 3) / 4; r += kLanes) {
      for (int c = 0; c < cols; c += kLanes) {
        transpose_square(quads[r] + c, kTileCols, turned[c] + r, kTileRows / 4);
      }
    }
    for (int c = 0; c < cols; ++c) {
      const auto* column = reinterpret_cast<const int8_t*>(turned[c]);
      int r = 0;
      for (; r + kCopied <= rows; r += kCopied) memcpy(out + c * stride + r, column + r, kCopied);
      if (r < rows) memcpy(out + c * stride + r, column + r, static_cast<size_t>(rows - r));
    }
  }

 private:
  static int squares_of(int n, int side) { return (n + side - 1) / side * side; }
};

// Both largest magnitudes come from one reading of x; a row's codes follow at once, while it is in
// cache, and the columns' in tiles from a second reading.
template <class Element>
void quantize_both(const QuantizeRowColArgs& a) {
  using Magnitude = typename Element::Magnitude;
  const auto* x = static_cast<const typename Element::Stored*>(a.x);
  const Source<Element> by_row{x, a.rounding, a.row_key, a.offset, a.rows * a.cols >= kAround};
  const Source<Element> by_col{x, a.rounding, a.col_key, a.offset, false};
  const size_t bytes = sizeof(Magnitude) * static_cast<size_t>(a.cols);
  Magnitude* col_amax = static_cast<Magnitude*>(calloc(1, bytes + 1));
  parallel_for(a.rows, rows_of_grain(a.cols), a.threads, [&](int64_t begin, int64_t end) {
    Magnitude* mine = static_cast<Magnitude*>(calloc(1, bytes + 1));
    Draws draws;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = r * a.cols;
      max_into<Element>(x + first, a.cols, mine);
      const Scale s = scale_of(Element::fp32_bits(amax_of<Element>(x + first, a.cols)));
      a.row_scale[r] = s.scale;
      by_row.encode_group(first, first + a.cols, end * a.cols, s.inv_scale, a.row_codes, draws);
    }
    by_row.settle();
#pragma omp critical(lowp_amax)
    for (int64_t c = 0; c < a.cols; ++c)
      col_amax[c] = mine[c] > col_amax[c] ? mine[c] : col_amax[c];
    free(mine);
  });
  parallel_for(a.cols, kTileCols, a.threads, [&](int64_t begin, int64_t end) {
    float inv_scale[kTileCols];
    Draws draws;
    Tile tile;
    for (int64_t c = begin; c < end; c += kTileCols) {
      const int cols = static_cast<int>(end - c < kTileCols ? end - c : kTileCols);
      for (int j = 0; j < cols; ++j) {
        const Scale s = scale_of(Element::fp32_bits(col_amax[c + j]));
        a.col_scale[c + j] = s.scale;
        inv_scale[j] = s.inv_scale;
      }
      for (int64_t r = 0; r < a.rows; r += kTileRows) {
        const int rows = static_cast<int>(a.rows - r < kTileRows ? a.rows - r : kTileRows);
        tile.fill(rows, cols, [&](int i, int8_t* codes) {
          const int64_t first = (r + i) * a.cols + c;
          if (r + i + kRowsAhead < a.rows) by_col.fetch(x + first + kRowsAhead * a.cols, cols);
          by_col.template encode<1>(first, cols, inv_scale, codes, draws);
        });
        tile.write(a.col_codes + c * a.rows + r, a.rows, rows, cols);
      }
    }
  });
  free(col_amax);
}

}  // namespace

void quantize(const QuantizeArgs& a) {
  with_element(a.x_type, [&](auto element) {
    using Element = decltype(element);
    switch (a.granularity) {
      case Granularity::tensor:
        return quantize_tensor<Element>(a);
      case Granularity::column:
        return quantize_columns<Element>(a);
      default:
        return quantize_rows<Element>(a);
    }
  });
}

void quantize_row_col(const QuantizeRowColArgs& a) {
  with_element(a.x_type, [&](auto element) { quantize_both<decltype(element)>(a); });
}

}  // namespace LOWP_ISA
}  // namespace lowp
