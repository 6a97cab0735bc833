#include "cuda/groups.h"

namespace lowp {
namespace cuda {
namespace {

struct DecodeArgs {
  const int8_t* codes;
  const float* scale;
  int64_t rows, cols, per_row;  // vectors of 16 codes a row
  Granularity granularity;
  int64_t block, blocks;        // elements of a block, blocks a row
  void* y;
  Float y_type;
  bool aligned;
};

struct Decode {
  using Args = DecodeArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {
    int32_t codes[16];
  };

  static LOWP_HD_MEMBER Span span_at(const Args& a, int64_t group, int64_t* row, int64_t* column) {
    const Quotient q = divide_index(group, a.per_row);
    *row = q.quotient;
    *column = q.remainder * 16;
    const Span columns = span_of<16>(*column, 0, a.cols);
    return {*row * a.cols + *column, columns.from, columns.to};
  }

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int, Lane& mine) {
    int64_t row, column;
    load_codes(a.codes, span_at(a, group, &row, &column), a.aligned, mine.codes);
  }

  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int, Lane& mine) {
    int64_t row, column;
    const Span s = span_at(a, group, &row, &column);
    float scale[16];
    scales_at(a, row, Span{column, s.from, s.to}, scale);
    float y[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) y[i] = static_cast<float>(mine.codes[i]) * scale[i];
    store_floats<16>(y, nullptr, a.y_type, s, a.aligned, a.y);
  }

  // The scales of 16 columns of a row.
  static LOWP_HD_MEMBER void scales_at(const Args& a, int64_t row, const Span& columns,
                                       float* scale) {
    if (a.granularity == Granularity::column) {
      const bool aligned = a.aligned && is_aligned(a.scale);
      return load_floats<16>(a.scale, Float::fp32, columns, aligned, scale);
    }
    const bool blocked = a.granularity == Granularity::block;
    const float* of_row = a.scale + (blocked ? row * a.blocks
                                             : (a.granularity == Granularity::row ? row : 0));
    const Quotient first = divide_index(blocked ? columns.begin : 0, blocked ? a.block : 1);
    if (!blocked || first.remainder + 16 <= a.block) {
      const float one = of_row[first.quotient];
#pragma unroll
      for (int i = 0; i < 16; ++i) scale[i] = one;
      return;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int64_t index = divide_index(columns.begin + i, a.block).quotient;
      scale[i] = columns.holds(i) ? of_row[index] : 0.0f;
    }
  }
};

}  // namespace

void dequantize(const Place& place, const DequantizeArgs& d) {
  int64_t rows = d.rows, cols = d.cols;
  if (d.granularity == Granularity::tensor) {
    cols = rows * cols;
    rows = 1;
  }
  const int64_t per_row = (cols + 15) / 16;
  const int64_t blocks = d.granularity == Granularity::block ? (cols + d.block - 1) / d.block : 1;
  const bool aligned = (rows == 1 || cols % 16 == 0) && is_aligned(d.codes) && is_aligned(d.y);
  launch_groups<Decode>("dequantize", place,
                        {d.codes, d.scale, rows, cols, per_row, d.granularity, d.block, blocks,
                         d.y, d.y_type, aligned},
                        rows * per_row);
}

}  // namespace cuda
}  // namespace lowp
