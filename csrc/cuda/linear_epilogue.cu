// What follows a product's fp32 sums, on its own: for the products that torch multiplies.
#include "cuda/finish.h"
#include "cuda/groups.h"

namespace lowp {
namespace cuda {
namespace {

struct EpilogueBody {
  struct Args {
    Finish finish;
    const float* sums;
    int64_t per_row;  // vectors of 8 columns
    bool aligned;     // rows of sums
  };
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {
    float z[8];
  };

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int, Lane& mine) {
    const Quotient q = divide_index(group, a.per_row);
    const Span columns = span_of<8>(q.remainder * 8, 0, a.finish.N);
    const Span s{q.quotient * a.finish.N + columns.begin, columns.from, columns.to};
    load_floats<8>(a.sums, Float::fp32, s, a.aligned, mine.z);
  }
  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int, Lane& mine) {
    const Quotient q = divide_index(group, a.per_row);
    finish_eight<float>(a.finish, q.quotient, q.remainder * 8, mine.z);
  }
};

}  // namespace

void linear_epilogue(const Place& place, const EpilogueArgs& e) {
  const Finish finish{e.epilogue, e.N, nullptr, 0, nullptr, 0, rows_aligned(e.epilogue, e.N)};
  const int64_t per_row = (e.N + 7) / 8;
  launch_groups<EpilogueBody>("linear_epilogue", place,
                              {finish, e.sums, per_row, e.N % 8 == 0 && is_aligned(e.sums)},
                              e.M * per_row);
}

}  // namespace cuda
}  // namespace lowp
