// The order of the sums is the contract's: 64 rows one after the other, then the sums of those. So
// one thread takes 64 rows of 8 columns, and a second kernel adds what the first one left.
#include "cuda/groups.h"

namespace lowp {
namespace cuda {
namespace {

constexpr int kGroupRows = 64;

struct SumArgs {
  const void* x;
  Float type;
  int64_t M, N, per_row;  // vectors of 8 columns
  int64_t rows;           // summed into one
  float* sums;            // [ceil(M / rows), N]
  bool aligned;
};

// Sums of `rows` adjacent rows, one after the other.
struct Sum {
  using Args = SumArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {
    float total[8];
  };

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int, Lane& mine) {
    const Quotient q = divide_index(group, a.per_row);
    const Span columns = span_of<8>(q.remainder * 8, 0, a.N);
    const int64_t first = q.quotient * a.rows;
    const int64_t last = first + a.rows < a.M ? first + a.rows : a.M;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine.total[i] = 0.0f;
#pragma unroll 8
    for (int64_t m = first; m < last; ++m) {
      float x[8];
      const Span s{m * a.N + columns.begin, columns.from, columns.to};
      load_floats<8>(a.x, a.type, s, a.aligned, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) mine.total[i] = mine.total[i] + x[i];
    }
  }

  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int, Lane& mine) {
    const Quotient q = divide_index(group, a.per_row);
    const Span columns = span_of<8>(q.remainder * 8, 0, a.N);
    const Span s{q.quotient * a.N + columns.begin, columns.from, columns.to};
    store_floats<8>(mine.total, nullptr, Float::fp32, s, a.aligned, a.sums);
  }
};

}  // namespace

void bias_grad(const Place& place, const BiasGradArgs& b, float* partial) {
  const int64_t per_row = (b.N + 7) / 8, groups = (b.M + kGroupRows - 1) / kGroupRows;
  const bool aligned = b.N % 8 == 0 && is_aligned(partial);
  launch_groups<Sum>("bias_grad", place,
                     {b.dy, b.dy_type, b.M, b.N, per_row, kGroupRows, partial,
                      aligned && is_aligned(b.dy)},
                     groups * per_row);
  launch_groups<Sum>("bias_grad", place,
                     {partial, Float::fp32, groups, b.N, per_row, groups > 0 ? groups : 1, b.db,
                      aligned && is_aligned(b.db)},
                     per_row);
}

}  // namespace cuda
}  // namespace lowp
