#include "cuda/sums.h"

namespace lowp {
namespace cuda {
namespace {

struct SumsArgs {
  RunTable<FloatTensor> table;
  double* partial;  // [runs]
  double* sums;     // [count]
};

struct SquareRuns {
  using Args = SumsArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int, Lane&) {
    const int64_t tensor = tensor_of(a.table.first_run, a.table.count, group);
    const FloatTensor& t = a.table.tensors[tensor];
    const Run r = flat_run(tensor, group - a.table.first_run[tensor], kSumRun, t.numel);
    double lanes[kSumLanes] = {};
#pragma unroll 2
    for (int64_t at = r.begin; at < r.end; at += kSumLanes) {
      const Span s = span_of<kSumLanes>(at, r.begin, r.end);
      float x[kSumLanes];
      load_floats<kSumLanes>(t.data, Float(t.type), s, vector_aligned(t.data, s), x);
      add_squares(x, lanes);
    }
    a.partial[group] = lane_sum(lanes);
  }
};

struct SquareTotals {
  using Args = SumsArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& a, int64_t i, int, Lane&) {
    a.sums[i] = run_sum(a.partial, a.table.first_run[i], a.table.first_run[i + 1]);
  }
};

}  // namespace

void square_sums(const Place& place, const RunTable<FloatTensor>& table, double* partial,
                 double* sums) {
  launch_groups<SquareRuns>("square_sums", place, {table, partial, sums}, table.runs);
  launch_groups<SquareTotals>("square_sums", place, {table, partial, sums}, table.count);
}

}  // namespace cuda
}  // namespace lowp
