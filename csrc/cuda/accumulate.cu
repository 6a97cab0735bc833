#include "cuda/states.h"

namespace lowp {
namespace cuda {
namespace {

struct Addition {
  struct Args {
    RunTable<AccumulateTensor> table;
    bool stochastic;
    uint64_t seed;
    const int64_t* step;
  };
  static constexpr int kLanes = kRunLanes, kMaxima = 0;
  struct Lane {
    float total[16];
  };

  static LOWP_HD_MEMBER Span span_at(const Args& a, int64_t group, int lane, int64_t tensor) {
    const Run r = flat_run(tensor, group - a.table.first_run[tensor], kStateBlock,
                           a.table.tensors[tensor].numel);
    return span_of<16>(r.begin + lane * 16, r.begin, r.end);
  }

  static LOWP_HD_MEMBER void load(const Args& a, int64_t group, int lane, Lane& mine) {
    const int64_t tensor = tensor_of(a.table.first_run, a.table.count, group);
    const AccumulateTensor& t = a.table.tensors[tensor];
    const Span s = span_at(a, group, lane, tensor);
    float grad[16];
    load_floats<16>(t.total, Float(t.total_type), s, vector_aligned(t.total, s), mine.total);
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), grad);
#pragma unroll
    for (int i = 0; i < 16; ++i) mine.total[i] = canonical_nan(mine.total[i] + grad[i]);
  }

  static LOWP_HD_MEMBER void store(const Args& a, int64_t group, int lane, Lane& mine) {
    constexpr uint32_t kRole = 8;
    const int64_t tensor = tensor_of(a.table.first_run, a.table.count, group);
    const AccumulateTensor& t = a.table.tensors[tensor];
    const Span s = span_at(a, group, lane, tensor);
    StateNoise noise = noise_of(a.seed, t, s);
    noise.step = static_cast<uint32_t>(*a.step);
    store_any(mine.total, a.stochastic, noise, kRole, t.total_type, s, t.total);
  }
};

}  // namespace

void accumulate(const Place& place, const AccumulateArgs& a, const int64_t* step,
                const RunTable<AccumulateTensor>& table) {
  launch_groups<Addition>("accumulate", place,
                          {table, a.rounding == Rounding::stochastic, a.seed, step}, table.runs);
}

}  // namespace cuda
}  // namespace lowp
