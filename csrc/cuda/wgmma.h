// Products on sm_90a: CUTLASS's warp-specialized TMA main loops, with an epilogue that works on the
// accumulators in their registers. Everything about the result is a run-time value (finish.h), so
// there is one kernel for each operand type, pair of layouts and tile.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/finish.h"
#include "cuda/launch.h"
#include "cuda/summing.h"

#ifndef LOWP_INLINE_DIVISION
#error "include this with LOWP_INLINE_DIVISION defined (numerics/divide.h)"
#endif

namespace lowp {
namespace cuda {

// The interface that cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter wraps.
class FinishEpilogue {
 public:
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    static constexpr int kCount = 1;
  };
  using ElementOutput = float;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementC = void;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  using Arguments = Finish;
  using Params = Finish;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& a, void*) {
    return a;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE FinishEpilogue(const Params& p, const SharedStorage& = SharedStorage())
      : params_(p) {}
  CUTLASS_DEVICE bool is_source_needed() { return false; }

  // accumulators: ((2, 2, groups of 8 columns), M, N) of one thread, as wgmma leaves them.
  template <class Problem, class Tile, class Coord, class Engine, class Layout, class Mma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem problem, Tile tile, Coord coord,
                                 const cute::Tensor<Engine, Layout>& accumulators, Mma mma, Residue,
                                 int thread, char*) {
    using namespace cute;
    const auto places = mma.get_thread_slice(thread).partition_C(
        make_identity_tensor(make_shape(get<0>(tile), get<1>(tile))));
    const int64_t m0 = int64_t(get<0>(coord)) * get<0>(tile);
    const int64_t n0 = int64_t(get<1>(coord)) * get<1>(tile);
    const int q = thread % 4;
    constexpr int kGroups = size<0, 2>(Layout{}), kM = size<1>(Layout{}), kN = size<2>(Layout{});
    static_assert(kGroups % 4 == 0, "a quad of lanes shares four groups of columns");
    constexpr int kChunks = size(Layout{}) / 8;
    const auto swap = [](auto value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); };
    // One copy of the code for all chunks, or it would not fit the instruction cache; registers
    // cannot be indexed at run time, so a chunk is picked by comparing.
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      typename Engine::value_type pairs[4][2];
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        if (c != k) continue;
        const auto at = place_of<kGroups, kM>(k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto in_atom = make_coord(i % 2, get<0>(at), get<1>(at) + i / 2);
          pairs[i / 2][i % 2] = accumulators(make_coord(in_atom, get<2>(at), get<3>(at)));
        }
      }
      gather_groups(pairs, q, swap);
      float z[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) z[i] = static_cast<float>(pairs[i / 2][i % 2]);
      const auto at = place_of<kGroups, kM>(c);
      const auto in_atom = make_coord(0, get<0>(at), get<1>(at));
      const auto place = places(make_coord(in_atom, get<2>(at), get<3>(at)));
      const int64_t m = m0 + get<0>(place);
      if (m < get<0>(problem)) {
        finish_eight<typename Engine::value_type>(params_, m, n0 + get<1>(place) + 6 * q, z);
      }
    }
  }

 private:
  // Chunk c as (half of the rows, first group, M, N).
  template <int kGroups, int kM>
  CUTLASS_DEVICE static cute::tuple<int, int, int, int> place_of(int c) {
    constexpr int kPerHalf = kGroups / 4;
    return {c / kPerHalf % 2, c % kPerHalf * 4, c / kPerHalf / 2 % kM, c / kPerHalf / 2 / kM};
  }

  Params params_;
};

// Element, layouts of both operands (along_k: adjacent along the sum), whether A's rows are summed
// too, and the tile of one kernel.
template <class Element, class Sum, bool kAAlongK, bool kBAlongK, bool kRowSums, class Tile,
          class Cluster, class Schedule>
struct WgmmaKernel {
  using LayoutA =
      cute::conditional_t<kAAlongK, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using LayoutB =
      cute::conditional_t<kBAlongK, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kVector = 16 / sizeof(Element);
  using Epilogue =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<FinishEpilogue>;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<1024>;
  using Plain = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, kVector, Element,
      LayoutB, kVector, Sum, Tile, Cluster, Stages, Schedule>::CollectiveOp;
  using MainLoop = cute::conditional_t<kRowSums, SummingMainLoop<Plain>, Plain>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;
};

// A matrix [rows, depth] for the copy engine: `line` elements from one line of adjacent elements to
// the next.
struct WgmmaOperand {
  const void* data;
  int64_t line;
};

template <bool kAlongK>
auto wgmma_stride(int64_t line) {
  if constexpr (kAlongK) {
    return cute::make_stride(line, cute::_1{}, int64_t{0});
  } else {
    return cute::make_stride(cute::_1{}, line, int64_t{0});
  }
}

template <class Element, class Sum, bool kAAlongK, bool kBAlongK, bool kRowSums, class Tile,
          class Cluster, class Schedule>
void launch_wgmma(const char* op, const Place& place, const WgmmaOperand& a, const WgmmaOperand& b,
                  int M, int N, int K, const Finish& finish, float* row_sums) {
  using Kernel = typename WgmmaKernel<Element, Sum, kAAlongK, kBAlongK, kRowSums, Tile, Cluster,
                                      Schedule>::Kernel;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "more than sm_90 gives a block");
  const DeviceGuard guard(op, place.device);  // the copy engine's descriptors belong to a context
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {M, N, K, 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(a.data);
  arguments.mainloop.dA = wgmma_stride<kAAlongK>(a.line);
  arguments.mainloop.ptr_B = static_cast<const Element*>(b.data);
  arguments.mainloop.dB = wgmma_stride<kBAlongK>(b.line);
  arguments.epilogue = finish;
  arguments.hw_info.device_id = place.device;
  arguments.hw_info.sm_count = capability(op, place.device).processors;
  arguments.scheduler.max_swizzle_size = 8;
  if constexpr (kRowSums) arguments.mainloop.row_sums = row_sums;
  typename Kernel::Params parameters = Kernel::to_underlying_arguments(arguments, nullptr);
  if constexpr (kRowSums) parameters.mainloop.scheduler = parameters.scheduler;
  const Grid grid{Kernel::get_grid_shape(parameters), Kernel::get_block_shape(),
                  static_cast<size_t>(Kernel::SharedStorageSize),
                  dim3(cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1)};
  launch<typename Kernel::Params>(op, place, cutlass::device_kernel<Kernel>, grid, parameters);
}

// Chooses the tile: 128 x 256 by two warp groups together where that fills the device, tiles of one
// warp group each, in turns, where it does not. row_sums: [M], of kRowSums alone.
template <class Element, class Sum, bool kAAlongK, bool kBAlongK, bool kRowSums = false>
void launch_wgmma_tile(const char* op, const Place& place, const WgmmaOperand& a,
                       const WgmmaOperand& b, int M, int N, int K, const Finish& finish,
                       float* row_sums = nullptr) {
  using namespace cute;
  using Depth = Int<128 / sizeof(Element)>;
  using Together = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using InTurns = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Pair = Shape<_2, _1, _1>;
  using Single = Shape<_1, _1, _1>;
  const auto tiles = [&](int64_t m, int64_t n) { return (M + m - 1) / m * ((N + n - 1) / n); };
  const int processors = capability(op, place.device).processors;
  if (tiles(128, 256) >= processors) {
    return launch_wgmma<Element, Sum, kAAlongK, kBAlongK, kRowSums, Shape<_128, _256, Depth>, Pair,
                        Together>(op, place, a, b, M, N, K, finish, row_sums);
  }
  if (tiles(128, 128) >= processors) {
    return launch_wgmma<Element, Sum, kAAlongK, kBAlongK, kRowSums, Shape<_128, _128, Depth>,
                        Single, InTurns>(op, place, a, b, M, N, K, finish, row_sums);
  }
  launch_wgmma<Element, Sum, kAAlongK, kBAlongK, kRowSums, Shape<_64, _128, Depth>, Single,
               InTurns>(op, place, a, b, M, N, K, finish, row_sums);
}

// What the copy engine asks of an operand: 16-byte lines, and sizes in 32 bits.
static inline bool wgmma_takes(const void* data, int64_t line, int64_t bytes) {
  return is_aligned(data) && line * bytes % 16 == 0 && line * bytes > 0;
}
static inline bool wgmma_takes_sizes(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kMost = 0x7FFFFFFF;
  return K > 0 && M <= kMost && N <= kMost && K <= kMost;
}

}  // namespace cuda
}  // namespace lowp
