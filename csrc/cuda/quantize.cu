// quantize and quantize_row_col. A row or block is read once and kept in registers; tensor and
// columns, whose scale is known only at the end, are read twice, the second time from L2 where they
// fit.
#include "cuda/encode.h"
#include "cuda/groups.h"
#include "cuda/tiles.h"

namespace lowp {
namespace cuda {
namespace {

// One row, or one block of a row, to a group of lanes. Vectors start at multiples of 16 elements of
// the whole matrix, so the first and the last one of a row may hold elements of its neighbours.
struct SpansArgs {
  const void* x;
  Float x_type;
  int64_t rows, cols, width, per_row;  // groups of `width` elements, per_row of them a row
  CodeNoise noise;
  int8_t* codes;
  float* scale;
  bool aligned;
};

template <int kLaneCount, int kHeld>
struct Spans {
  using Args = SpansArgs;
  static constexpr int kLanes = kLaneCount, kMaxima = 1;
  struct Lane {
    float x[kHeld][16];
    uint32_t maxima[1];
  };

  struct Where {
    int64_t begin, end, first, vectors;
  };
  static LOWP_HD_MEMBER Where where(const Args& a, int64_t group) {
    const Quotient q = divide_index(group, a.per_row);
    const int64_t begin = q.quotient * a.cols + q.remainder * a.width;
    const int64_t row_end = (q.quotient + 1) * a.cols;
    const int64_t end = begin + a.width < row_end ? begin + a.width : row_end;
    const int64_t first = begin / 16;
    return {begin, end, first, end > begin ? (end - 1) / 16 - first + 1 : 0};
  }

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int lane, Lane& mine) {
    const Where p = where(a, group);
    uint32_t amax = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t v = k * kLanes + lane;
      if (v >= p.vectors) continue;
      const Span s = span_of<16>((p.first + v) * 16, p.begin, p.end);
      load_floats<16>(a.x, a.x_type, s, a.aligned, mine.x[k]);
      amax = amax_bits<16>(mine.x[k], amax);
    }
    for (int64_t v = kHeld * kLanes + lane; v < p.vectors; v += kLanes) {
      float x[16];
      const Span s = span_of<16>((p.first + v) * 16, p.begin, p.end);
      load_floats<16>(a.x, a.x_type, s, a.aligned, x);
      amax = amax_bits<16>(x, amax);
    }
    mine.maxima[0] = amax;
  }

  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int lane, Lane& mine) {
    const Where p = where(a, group);
    const Scale scale = scale_of(mine.maxima[0]);
    if (lane == 0) a.scale[group] = scale.scale;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t v = k * kLanes + lane;
      if (v < p.vectors) encode(a, p, v, mine.x[k], scale.inv_scale);
    }
    for (int64_t v = kHeld * kLanes + lane; v < p.vectors; v += kLanes) {
      float x[16];
      const Span s = span_of<16>((p.first + v) * 16, p.begin, p.end);
      load_floats<16>(a.x, a.x_type, s, a.aligned, x);
      encode(a, p, v, x, scale.inv_scale);
    }
  }

  static LOWP_HD_MEMBER void encode(const Args& a, const Where& p, int64_t v, const float* x,
                                    float inv_scale) {
    int32_t codes[16];
    const Span s = span_of<16>((p.first + v) * 16, p.begin, p.end);
    encode_vector<0>(x, &inv_scale, a.noise, s.begin, codes);
    store_codes(codes, s, a.aligned, a.codes);
  }
};

// The maxima of lines: of rows, of columns or of all, into words that start as zeros. A warp takes
// a square of 64 rows and 512 columns.
struct LinesArgs {
  const void* x;
  Float x_type;
  int64_t rows, cols, per_row;  // squares in a row of squares
  uint32_t *of_rows, *of_columns, *of_all;  // [rows], [cols], [1], each or null
  bool aligned;
};

struct Lines {
  using Args = LinesArgs;
  static constexpr int kLanes = 32, kMaxima = 0, kRows = 64, kCols = 16 * kLanes;
  struct Lane {
    uint32_t amax[16];
  };

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int lane, Lane& mine) {
    const Quotient q = divide_index(group, a.per_row);
    const int64_t row0 = q.quotient * kRows;
    const Span columns = span_of<16>(q.remainder * kCols + lane * 16, 0, a.cols);
    const int rows = static_cast<int>(a.rows - row0 < kRows ? a.rows - row0 : kRows);
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      float x[16];
      const Span s{(row0 + r) * a.cols + columns.begin, columns.from, columns.to};
      load_floats<16>(a.x, a.x_type, s, a.aligned, x);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t bits = float_bits(x[i]) & 0x7FFFFFFFu;
        mine.amax[i] = bits > mine.amax[i] ? bits : mine.amax[i];
      }
      if (a.of_rows != nullptr) raise_together(a.of_rows + row0 + r, amax_bits<16>(x, 0));
    }
  }

  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int lane, Lane& mine) {
    const int64_t column = divide_index(group, a.per_row).remainder * kCols + lane * 16;
    const Span columns = span_of<16>(column, 0, a.cols);
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      amax = mine.amax[i] > amax ? mine.amax[i] : amax;
      if (a.of_columns == nullptr || !columns.holds(i)) continue;
      raise(a.of_columns + column + i, mine.amax[i]);
    }
    if (a.of_all != nullptr) raise_together(a.of_all, amax);
  }
};

// Maxima to scales; the reciprocals replace the maxima.
struct ScalesArgs {
  uint32_t* amax;  // [count] in, inv_scale as bits out
  float *first, *second;  // scales of the first `split` and of the others
  int64_t split;
};

struct Scales {
  using Args = ScalesArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& a, int64_t i, int, Lane&) {
    const Scale s = scale_of(a.amax[i]);
    (i < a.split ? a.first[i] : a.second[i - a.split]) = s.scale;
    a.amax[i] = float_bits(s.inv_scale);
  }
};

// Codes of a matrix whose reciprocals are known; all of them share the first one, or each column
// has one.
struct EncodeArgs {
  const void* x;
  Float x_type;
  int64_t rows, cols, per_row;  // vectors a row
  const float* inv_scale;
  bool of_columns;
  CodeNoise noise;
  int8_t* codes;
  bool aligned;
};

struct Encode {
  using Args = EncodeArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {
    float x[16];
  };

  static LOWP_HD_MEMBER Span span_at(const Args& a, int64_t group, int64_t* column) {
    const Quotient q = divide_index(group, a.per_row);
    *column = q.remainder * 16;
    const Span columns = span_of<16>(*column, 0, a.cols);
    return {q.quotient * a.cols + *column, columns.from, columns.to};
  }
  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int, Lane& mine) {
    int64_t column;
    load_floats<16>(a.x, a.x_type, span_at(a, group, &column), a.aligned, mine.x);
  }
  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int, Lane& mine) {
    int64_t column;
    const Span s = span_at(a, group, &column);
    int32_t codes[16];
    if (a.of_columns) {
      float inv_scale[16];
      const Span columns{column, s.from, s.to};
      load_floats<16>(a.inv_scale, Float::fp32, columns, a.aligned, inv_scale);
      encode_vector<1>(mine.x, inv_scale, a.noise, s.begin, codes);
    } else {
      encode_vector<0>(mine.x, a.inv_scale, a.noise, s.begin, codes);
    }
    store_codes(codes, s, a.aligned, a.codes);
  }
};

// Row codes as they come, column codes turned.
struct BothArgs {
  const void* x;
  Float x_type;
  int64_t rows, cols;
  const float *row_inv_scale, *col_inv_scale;
  CodeNoise row_noise, col_noise;
  int8_t* row_codes;
  bool aligned;
};

struct Both {
  using Args = BothArgs;

  static LOWP_HD_MEMBER void load(const Args& a, int64_t row, int64_t column, int32_t* codes) {
    const Span columns = span_of<16>(column, 0, row < a.rows ? a.cols : 0);
    const Span s{row * a.cols + column, columns.from, columns.to};
    if (s.to == 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) codes[i] = 0;
      return;
    }
    float x[16], inv_scale[16];
    load_floats<16>(a.x, a.x_type, s, a.aligned, x);
    encode_vector<0>(x, a.row_inv_scale + row, a.row_noise, s.begin, codes);
    store_codes(codes, s, a.aligned, a.row_codes);
    load_floats<16>(a.col_inv_scale, Float::fp32, Span{column, s.from, s.to}, a.aligned, inv_scale);
    encode_vector<1>(x, inv_scale, a.col_noise, s.begin, codes);
  }
};

// Rows of a matrix start at multiples of 16 bytes of all that is read and written.
bool rows_start_aligned(int64_t cols, const void* x, const void* codes) {
  return cols % 16 == 0 && is_aligned(x) && is_aligned(codes);
}

void find_maxima(const char* op, const Place& place, LinesArgs a) {
  a.per_row = (a.cols + Lines::kCols - 1) / Lines::kCols;
  launch_groups<Lines>(op, place, a, (a.rows + Lines::kRows - 1) / Lines::kRows * a.per_row);
}

template <int kLanes, int kHeld>
void launch_spans(const Place& place, const SpansArgs& a) {
  launch_groups<Spans<kLanes, kHeld>>("quantize", place, a, a.rows * a.per_row);
}

void quantize_spans(const Place& place, const QuantizeArgs& q, const CodeNoise& noise) {
  const bool by_row = q.granularity == Granularity::row;
  const int64_t width = by_row ? q.cols : q.block;
  const int64_t per_row = by_row ? 1 : (q.cols + width - 1) / width;
  const SpansArgs a{q.x,   q.x_type, q.rows,  q.cols,  width, per_row,
                    noise, q.codes,  q.scale, is_aligned(q.x) && is_aligned(q.codes)};
  if (width <= 8 * 16) return launch_spans<8, 1>(place, a);
  if (width <= 32 * 2 * 16) return launch_spans<32, 2>(place, a);
  if (width <= 128 * 2 * 16) return launch_spans<128, 2>(place, a);
  return launch_spans<512, 2>(place, a);
}

}  // namespace

void quantize(const Place& place, const QuantizeArgs& q, const int64_t* step,
              uint32_t* workspace) {
  const CodeNoise noise{q.rounding, q.key, step, q.offset};
  if (q.granularity == Granularity::row || q.granularity == Granularity::block) {
    return quantize_spans(place, q, noise);
  }
  const bool of_columns = q.granularity == Granularity::column;
  // All elements of a tensor share a scale, so it is one row, or rows as wide as a square where
  // they fit.
  int64_t rows = q.rows, cols = q.cols;
  if (!of_columns) {
    const int64_t numel = rows * cols;
    cols = numel % Lines::kCols == 0 && numel > 0 ? Lines::kCols : numel;
    rows = cols > 0 ? numel / cols : 0;
  }
  const bool aligned = rows_start_aligned(rows == 1 ? 0 : cols, q.x, q.codes);
  find_maxima("quantize", place,
              {q.x, q.x_type, rows, cols, 0, nullptr, of_columns ? workspace : nullptr,
               of_columns ? nullptr : workspace, aligned});
  const int64_t scales = of_columns ? q.cols : 1;
  launch_groups<Scales>("quantize", place, {workspace, q.scale, nullptr, scales}, scales);
  const int64_t vectors = (cols + 15) / 16;
  launch_groups<Encode>("quantize", place,
                        {q.x, q.x_type, rows, cols, vectors,
                         reinterpret_cast<const float*>(workspace), of_columns, noise, q.codes,
                         aligned},
                        rows * vectors);
}

void quantize_row_col(const Place& place, const QuantizeRowColArgs& q, const int64_t* step,
                      uint32_t* workspace) {
  const bool aligned = rows_start_aligned(q.cols, q.x, q.row_codes);
  find_maxima("quantize_row_col", place,
              {q.x, q.x_type, q.rows, q.cols, 0, workspace + q.cols, workspace, nullptr, aligned});
  launch_groups<Scales>("quantize_row_col", place,
                        {workspace, q.col_scale, q.row_scale, q.cols}, q.rows + q.cols);
  const float* inv_scale = reinterpret_cast<const float*>(workspace);
  launch_tiles<Both>(
      "quantize_row_col", place,
      {q.x, q.x_type, q.rows, q.cols, inv_scale + q.cols, inv_scale,
       {q.rounding, q.row_key, step, q.offset}, {q.rounding, q.col_key, step, q.offset},
       q.row_codes, aligned},
      {q.rows, q.cols, q.col_codes, q.rows % 16 == 0 && is_aligned(q.col_codes)});
}

}  // namespace cuda
}  // namespace lowp
