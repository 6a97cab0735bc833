// Kernels as bodies that host and device both run. A group of lanes works on one piece: each lane
// loads, the group shares the maxima of what its lanes found, each lane stores. A body has
//   Args                            passed to the kernel by value
//   kLanes                          lanes of a group: a power of two up to 32, or a whole block of
//   threads
//   kMaxima                         words that the group's lanes share the maxima of, 0 to 2
//   Lane                            what a lane keeps between its two halves; .maxima[kMaxima] if
//   any
//   load(args, group, lane, Lane&), store(args, group, lane, Lane&)
// The tests build the same sources without a CUDA compiler: launch_groups then walks the same grid
// in plain loops.
#pragma once
#ifdef __CUDACC__
#include "cuda/launch.h"
#else
#include <vector>
#endif
#include "cuda/ops.h"
#include "cuda/vectors.h"

namespace lowp {
namespace cuda {

constexpr int kThreads = 256;

template <class Body>
constexpr int block_threads() {
  return Body::kLanes > 32 ? Body::kLanes : kThreads;
}

// index = quotient * divisor + remainder; a 64-bit division is slow on a GPU, so it is kept to
// where it is needed.
struct Quotient {
  int64_t quotient, remainder;
};
LOWP_HD Quotient divide_index(int64_t index, int64_t divisor) {
  if (static_cast<uint64_t>(index | divisor) >> 32 == 0) {
    const uint32_t n = static_cast<uint32_t>(index), d = static_cast<uint32_t>(divisor);
    return {n / d, n % d};
  }
  return {index / divisor, index % divisor};
}

// *p = max(*p, value), whoever else does so at the same time.
LOWP_HD void raise(uint32_t* p, uint32_t value) {
#ifdef __CUDA_ARCH__
  atomicMax(p, value);
#else
  if (value > *p) *p = value;
#endif
}

// The same by all 32 lanes of a warp for one p.
LOWP_HD void raise_together(uint32_t* p, uint32_t value) {
#ifdef __CUDA_ARCH__
  const uint32_t most = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) atomicMax(p, most);
#else
  raise(p, value);
#endif
}

#ifdef __CUDACC__
template <class Body>
static __device__ __forceinline__ void share_maxima(typename Body::Lane& mine) {
  if constexpr (Body::kMaxima > 0) {
    constexpr int kInWarp = Body::kLanes < 32 ? Body::kLanes : 32;
#pragma unroll
    for (int i = 0; i < Body::kMaxima; ++i) {
      uint32_t most = mine.maxima[i];
#pragma unroll
      for (int bit = kInWarp / 2; bit > 0; bit /= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, most, bit);
        most = other > most ? other : most;
      }
      if constexpr (Body::kLanes > 32) {
        __shared__ uint32_t of_warps[Body::kLanes / 32];
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < Body::kLanes / 32; ++w) {
          most = of_warps[w] > most ? of_warps[w] : most;
        }
        __syncthreads();
      }
      mine.maxima[i] = most;
    }
  }
}

template <class Body>
__global__ void __launch_bounds__(block_threads<Body>())
    group_kernel(const __grid_constant__ typename Body::Args args, int64_t groups) {
  constexpr int kPerBlock = block_threads<Body>() / Body::kLanes;
  const int lane = threadIdx.x % Body::kLanes;
  const int64_t stride = int64_t{gridDim.x} * kPerBlock;
  for (int64_t first = int64_t{blockIdx.x} * kPerBlock; first < groups; first += stride) {
    const int64_t group = first + threadIdx.x / Body::kLanes;
    typename Body::Lane mine = {};
    if (group < groups) Body::load(args, group, lane, mine);
    share_maxima<Body>(mine);
    if (group < groups) Body::store(args, group, lane, mine);
  }
}

template <class Body>
void launch_groups(const char* op, const Place& place, const typename Body::Args& args,
                   int64_t groups) {
  constexpr int64_t kPerBlock = block_threads<Body>() / Body::kLanes;
  constexpr int64_t kMostBlocks = 1 << 30;
  const int64_t blocks = (groups + kPerBlock - 1) / kPerBlock;
  const Grid grid{dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)),
                  dim3(block_threads<Body>())};
  launch<typename Body::Args, int64_t>(op, place, group_kernel<Body>, grid, args, groups);
}
#else
extern int64_t host_blocks;  // blocks of the grid that the tests ask for

template <class Body>
void launch_groups(const char*, const Place&, const typename Body::Args& args, int64_t groups) {
  constexpr int kPerBlock = block_threads<Body>() / Body::kLanes;
  for (int64_t block = 0; block < host_blocks; ++block) {
    for (int64_t first = block * kPerBlock; first < groups; first += host_blocks * kPerBlock) {
      for (int64_t group = first; group < first + kPerBlock && group < groups; ++group) {
        std::vector<typename Body::Lane> lanes(Body::kLanes);
        for (int i = 0; i < Body::kLanes; ++i) Body::load(args, group, i, lanes[i]);
        if constexpr (Body::kMaxima > 0) {
          for (int i = 0; i < Body::kMaxima; ++i) {
            uint32_t most = 0;
            for (const auto& lane : lanes) most = lane.maxima[i] > most ? lane.maxima[i] : most;
            for (auto& lane : lanes) lane.maxima[i] = most;
          }
        }
        for (int i = 0; i < Body::kLanes; ++i) Body::store(args, group, i, lanes[i]);
      }
    }
  }
}
#endif

}  // namespace cuda
}  // namespace lowp
