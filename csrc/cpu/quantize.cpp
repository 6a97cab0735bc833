#include "quantize.h"

#include "cpu/draws.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "numerics/scale.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it brings

int64_t rows_of_grain(int64_t cols) { return cols >= kGrain ? 1 : kGrain / (cols > 0 ? cols : 1); }

uint32_t amax_of(const float* x, int n, uint32_t amax) {
  for (int i = 0; i < n; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    amax = a > amax ? a : amax;
  }
  return amax;
}

void max_into(const float* x, int n, uint32_t* amax) {
  for (int i = 0; i < n; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    amax[i] = a > amax[i] ? a : amax[i];
  }
}

// inv_scale: one value (stride 0) or one a column (stride 1); 0 where all codes are 0.
template <int kStride>
void codes_rn(const float* x, const float* inv_scale, int n, int8_t* codes) {
  for (int i = 0; i < n; ++i) {
    const float inv = inv_scale[i * kStride];
    codes[i] = static_cast<int8_t>(code_rn(inv == 0.0f ? 0.0f : x[i] * inv));
  }
}

template <int kStride>
void codes_sr(const float* x, const float* inv_scale, const uint16_t* draws, int n, int8_t* codes) {
  for (int i = 0; i < n; ++i) {
    const float inv = inv_scale[i * kStride];
    codes[i] = static_cast<int8_t>(code_sr(inv == 0.0f ? 0.0f : x[i] * inv, draws[i]));
  }
}

// Codes of x[begin .. begin+n), which lie in one row and share inv_scale or have one each.
template <int kStride>
void encode(const QuantizeArgs& a, int64_t begin, int n, const float* inv_scale, Draws& draws) {
  float x[kRun];
  load_floats(a.x, a.x_type, begin, n, x);
  if (a.rounding == Rounding::nearest) {
    codes_rn<kStride>(x, inv_scale, n, a.codes + begin);
  } else {
    codes_sr<kStride>(x, inv_scale, draws.fill(a.key, a.offset + begin, n), n, a.codes + begin);
  }
}

int run_length(int64_t begin, int64_t end) {
  return static_cast<int>(end - begin < kRun ? end - begin : kRun);
}

uint32_t amax_of_range(const void* x, Float type, int64_t begin, int64_t end) {
  float values[kRun];
  uint32_t amax = 0;
  for (int64_t i = begin; i < end; i += kRun) {
    const int n = run_length(i, end);
    load_floats(x, type, i, n, values);
    amax = amax_of(values, n, amax);
  }
  return amax;
}

// One contiguous group: its amax, its scale, its codes.
void quantize_group(const QuantizeArgs& a, int64_t begin, int64_t end, float* scale, Draws& draws) {
  const Scale s = scale_of(amax_of_range(a.x, a.x_type, begin, end));
  *scale = s.scale;
  for (int64_t i = begin; i < end; i += kRun) {
    encode<0>(a, i, run_length(i, end), &s.inv_scale, draws);
  }
}

void quantize_tensor(const QuantizeArgs& a) {
  const int64_t numel = a.rows * a.cols;
  uint32_t amax = 0;
  parallel_for(numel, kGrain, a.threads, [&](int64_t begin, int64_t end) {
    const uint32_t mine = amax_of_range(a.x, a.x_type, begin, end);
#pragma omp critical(lowp_amax)
    amax = mine > amax ? mine : amax;
  });
  const Scale s = scale_of(amax);
  *a.scale = s.scale;
  parallel_for(numel, kGrain, a.threads, [&](int64_t begin, int64_t end) {
    Draws draws;
    for (int64_t i = begin; i < end; i += kRun) {
      encode<0>(a, i, run_length(i, end), &s.inv_scale, draws);
    }
  });
}

void quantize_rows(const QuantizeArgs& a) {
  const int64_t block = a.granularity == Granularity::row ? a.cols : a.block;
  const int64_t blocks = a.granularity == Granularity::row ? 1 : (a.cols + block - 1) / block;
  parallel_for(a.rows, rows_of_grain(a.cols), a.threads, [&](int64_t begin, int64_t end) {
    Draws draws;
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block;
        const int64_t last = first + block < a.cols ? first + block : a.cols;
        quantize_group(a, r * a.cols + first, r * a.cols + last, a.scale + r * blocks + b, draws);
      }
    }
  });
}

// Threads share out the columns; a run of them is read for its amax and again for its codes.
void quantize_columns(const QuantizeArgs& a) {
  const int64_t grain = rows_of_grain(a.rows) > 64 ? rows_of_grain(a.rows) : 64;
  parallel_for(a.cols, grain, a.threads, [&](int64_t begin, int64_t end) {
    float values[kRun], inv_scale[kRun];
    uint32_t amax[kRun];
    Draws draws;
    for (int64_t c = begin; c < end; c += kRun) {
      const int n = run_length(c, end);
      for (int i = 0; i < n; ++i) amax[i] = 0;
      for (int64_t r = 0; r < a.rows; ++r) {
        load_floats(a.x, a.x_type, r * a.cols + c, n, values);
        max_into(values, n, amax);
      }
      for (int i = 0; i < n; ++i) {
        const Scale s = scale_of(amax[i]);
        a.scale[c + i] = s.scale;
        inv_scale[i] = s.inv_scale;
      }
      for (int64_t r = 0; r < a.rows; ++r) encode<1>(a, r * a.cols + c, n, inv_scale, draws);
    }
  });
}

constexpr int kTileRows = 64, kTileCols = 128;

// Column codes of one tile of x, written transposed.
void encode_tile(const QuantizeRowColArgs& a, int64_t r0, int rows, int64_t c0, int cols,
                 const float* inv_scale, Draws& draws) {
  int8_t tile[kTileRows][kTileCols];
  float x[kTileCols];
  for (int i = 0; i < rows; ++i) {
    const int64_t begin = (r0 + i) * a.cols + c0;
    load_floats(a.x, a.x_type, begin, cols, x);
    if (a.rounding == Rounding::nearest) {
      codes_rn<1>(x, inv_scale, cols, tile[i]);
    } else {
      codes_sr<1>(x, inv_scale, draws.fill(a.col_key, a.offset + begin, cols), cols, tile[i]);
    }
  }
  for (int j = 0; j < cols; ++j) {
    int8_t* out = a.col_codes + (c0 + j) * a.rows + r0;
    for (int i = 0; i < rows; ++i) out[i] = tile[i][j];
  }
}

}  // namespace

void quantize(const QuantizeArgs& a) {
  switch (a.granularity) {
    case Granularity::tensor:
      return quantize_tensor(a);
    case Granularity::column:
      return quantize_columns(a);
    default:
      return quantize_rows(a);
  }
}

// Columns are shared out in the outer loop and rows are walked in tiles, so a stripe of x is read
// for its amax and again, from cache where it fits, for its codes.
void quantize_row_col(const QuantizeRowColArgs& a) {
  const QuantizeArgs by_row{a.x,         a.x_type,   a.rows,    a.cols,   Granularity::row,
                            0,           a.rounding, a.row_key, a.offset, a.row_codes,
                            a.row_scale, a.threads};
  quantize_rows(by_row);
  parallel_for(a.cols, kTileCols, a.threads, [&](int64_t begin, int64_t end) {
    float values[kTileCols], inv_scale[kTileCols];
    uint32_t amax[kTileCols];
    Draws draws;
    for (int64_t c = begin; c < end; c += kTileCols) {
      const int cols = static_cast<int>(end - c < kTileCols ? end - c : kTileCols);
      for (int j = 0; j < cols; ++j) amax[j] = 0;
      for (int64_t r = 0; r < a.rows; ++r) {
        load_floats(a.x, a.x_type, r * a.cols + c, cols, values);
        max_into(values, cols, amax);
      }
      for (int j = 0; j < cols; ++j) {
        const Scale s = scale_of(amax[j]);
        a.col_scale[c + j] = s.scale;
        inv_scale[j] = s.inv_scale;
      }
      for (int64_t r = 0; r < a.rows; r += kTileRows) {
        const int rows = static_cast<int>(a.rows - r < kTileRows ? a.rows - r : kTileRows);
        encode_tile(a, r, rows, c, cols, inv_scale, draws);
      }
    }
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
