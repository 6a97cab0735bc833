// int8 wgmma and mma read both operands along the summed dimension: codes that lie the other way
// are turned.
#include "cuda/tiles.h"

namespace lowp {
namespace cuda {
namespace {

struct Plain {
  struct Args {
    const int8_t* x;
    int64_t rows, cols;
    bool aligned;
  };
  static LOWP_HD_MEMBER void load(const Args& a, int64_t row, int64_t column, int32_t* codes) {
    const Span columns = span_of<16>(column, 0, row < a.rows ? a.cols : 0);
    load_codes(a.x, Span{row * a.cols + column, columns.from, columns.to}, a.aligned, codes);
  }
};

}  // namespace

void transpose_codes(const Place& place, const int8_t* x, int64_t M, int64_t N, int8_t* y) {
  launch_tiles<Plain>("scaled_mm", place, {x, M, N, N % 16 == 0 && is_aligned(x)},
                      {M, N, y, M % 16 == 0 && is_aligned(y)});
}

}  // namespace cuda
}  // namespace lowp
