// CUTLASS's main loop on sm_90a that, for the tiles of the first column, also sums A's rows, out of
// the stages that wgmma reads, while it reads them. A stage holds 64 values of a row: one group of
// bias_grad's order.
#pragma once
#include <cutlass/arch/barrier.h>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

namespace lowp {
namespace cuda {

template <class MainLoop>
struct SummingMainLoop : MainLoop {
  using Base = MainLoop;
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  static constexpr int kWarpGroups =
      size(typename Base::TiledMma{}) / cutlass::NumThreadsPerWarpGroup;
  static constexpr int kRows = cute::size<0>(typename Base::TileShape{}) / kWarpGroups;
  static constexpr int kDepth = cute::size<2>(typename Base::TileShape{});
  static constexpr bool kInTurns =
      cute::is_base_of_v<cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                         typename Base::DispatchPolicy::Schedule>;
  static_assert(kDepth == 64, "a stage is one group of the contract");

  struct Arguments : Base::Arguments {
    float* row_sums;  // [M]
  };
  struct Params : Base::Params {
    float* row_sums;
    int rows;
    Scheduler::Params scheduler;  // a copy of the kernel's
  };

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem& problem, const Arguments& a,
                                                  void* workspace) {
    return {Base::to_underlying_arguments(problem, a, workspace),
            a.row_sums,
            cute::get<0>(problem),
            {}};
  }

  // Called by a consumer for each of its tiles in their order, as the kernel's scheduler has them:
  // all of the block's for two warp groups together, every other one where they take turns.
  template <class Fragment>
  CUTLASS_DEVICE void mma(typename Base::MainloopPipeline pipeline,
                          typename Base::PipelineState read, Fragment& sums, int k_tiles,
                          int thread, typename Base::TensorStorage& shared, const Params& params) {
    Scheduler scheduler(params.scheduler);
    const int first = kInTurns ? cutlass::canonical_warp_group_idx() - 1 : 0;
    scheduler.advance_to_next_work(first + turn_++ * (kInTurns ? 2 : 1));
    const auto tile = scheduler.get_current_work();
    if (tile.N_idx != 0) return Base::mma(pipeline, read, sums, k_tiles, thread, shared, params);
    const float total = multiply_and_sum(pipeline, read, sums, k_tiles, thread, shared);
    const int64_t m = int64_t{tile.M_idx} * kWarpGroups * kRows + row_of(thread);
    if (has_row(thread) && m < params.rows) params.row_sums[m] = total;
  }

 private:
  // A thread of each warp group has one of its rows, the others none.
  CUTLASS_DEVICE static bool has_row(int thread) {
    return thread % cutlass::NumThreadsPerWarpGroup < kRows;
  }
  CUTLASS_DEVICE static int row_of(int thread) {
    constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
    return thread / kThreads * kRows + thread % kThreads;
  }

  // As Base::mma: the first product apart, for it begins the sums and has none before it to wait
  // for; the caller's mma_tail waits for the last one and releases its stage.
  template <class Fragment>
  CUTLASS_DEVICE static float multiply_and_sum(typename Base::MainloopPipeline& pipeline,
                                               typename Base::PipelineState read, Fragment& sums,
                                               int k_tiles, int thread,
                                               typename Base::TensorStorage& shared) {
    using namespace cute;
    const Tensor all_a =
        make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    const Tensor all_b =
        make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    const int group = __shfl_sync(~0u, thread / cutlass::NumThreadsPerWarpGroup, 0);
    typename Base::TiledMma tiled_mma;
    const auto mine = tiled_mma.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    const Tensor a = mine.make_fragment_A(mine.partition_A(all_a));
    const Tensor b = mine.make_fragment_B(mine.partition_B(all_b));
    typename Base::PipelineState release = read;
    float total = 0.0f;
    const auto add_rows = [&](int stage) {
      if (has_row(thread)) {
        float part = 0.0f;
#pragma unroll 8
        for (int i = 0; i < kDepth; ++i) {
          part = part + static_cast<float>(all_a(row_of(thread), i, stage));
        }
        total = total + part;
      }
      // One thread of the warp group releases a stage for all of them.
      const int barrier = kInTurns ? cutlass::canonical_warp_group_idx() : 1 + group;
      cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup, barrier);
    };

    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(sums);
    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<2>(a); ++i) {
      cute::gemm(tiled_mma, a(_, _, i, read.index()), b(_, _, i, read.index()), sums);
      tiled_mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    add_rows(read.index());
    ++read;
    warpgroup_fence_operand(sums);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int k = 1; k < k_tiles; ++k) {
      pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      cute::gemm(tiled_mma, a(_, _, _, read.index()), b(_, _, _, read.index()), sums);
      warpgroup_commit_batch();
      add_rows(read.index());
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++read;
      ++release;
    }
    warpgroup_fence_operand(sums);
    return total;
  }

  int turn_ = 0;
};

}  // namespace cuda
}  // namespace lowp
