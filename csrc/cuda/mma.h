// Products by mma.sync: any shape, any strides, from sm_80 on. A block of 8 warps computes 128 x
// 128 sums from panels of 64 bytes along the summed dimension, four stages of them in shared
// memory. The blocks of the first column also sum A's rows if asked to.
#pragma once
#include "cuda/finish.h"
#include "cuda/launch.h"
#include "cuda/panels.h"

namespace lowp {
namespace cuda {

constexpr int kStages = 4;
constexpr int kMmaThreads = 256;

struct MmaOperand {
  const char* data;
  int64_t rows, depth;  // elements
  int64_t row_stride, k_stride;
  bool aligned;  // 16-byte accesses are possible
};

struct MmaArgs {
  MmaOperand a, b;
  Finish finish;
  float* row_sums;  // [M], of kRowSums alone
  int64_t tiles_m, tiles_n;
};

// bf16 and fp16: 16 values along the sum, fp32 sums.
template <Float type>
struct HalfMma {
  using Sum = float;
  static constexpr Float kType = type;
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    if constexpr (type == Float::bf16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
};

// int8: 32 values along the sum, int32 sums. The registers hold the same bytes as those of 16-bit
// values.
struct CodeMma {
  using Sum = int32_t;
  static constexpr int kBytes = 1;
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory in the background, of which the first `bytes` are read and the others
// zeros.
__device__ __forceinline__ void copy_async(uint32_t target, const char* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

template <bool kTurned>
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// One stage of one operand: rows row0 .. row0+127, bytes k0 .. k0+63 along k.
template <class Mma, bool kAlongK>
__device__ __forceinline__ void fetch_panel(const MmaOperand& x, int64_t row0, int64_t k0,
                                            char* panel) {
  constexpr int kPerChunk = 16 / Mma::kBytes;
#pragma unroll
  for (int i = 0; i < kPanelSize / 16 / kMmaThreads; ++i) {
    const int index = i * kMmaThreads + static_cast<int>(threadIdx.x);
    const int line = kAlongK ? index / 4 : index / 16, chunk = kAlongK ? index % 4 : index % 16;
    const int64_t row = row0 + (kAlongK ? line : chunk * kPerChunk);
    const int64_t k = k0 + (kAlongK ? chunk * kPerChunk : line);
    const int64_t left = row >= x.rows || k >= x.depth ? 0 : (kAlongK ? x.depth - k : x.rows - row);
    const int count = left < kPerChunk ? static_cast<int>(left) : kPerChunk;
    const char* source = x.data + (row * x.row_stride + k * x.k_stride) * Mma::kBytes;
    char* target = panel + chunk_offset<kAlongK>(line, chunk);
    if (x.aligned) {
      copy_async(shared_address(target), count > 0 ? source : x.data, count * Mma::kBytes);
    } else {
      Words v = {};
      const int64_t stride = kAlongK ? x.k_stride : x.row_stride;
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) {
        if (j >= count) continue;
        uint32_t value;
        if constexpr (Mma::kBytes == 1) {
          value = static_cast<uint8_t>(source[j * stride]);
        } else {
          value = reinterpret_cast<const uint16_t*>(source)[j * stride];
        }
        v.w[j * Mma::kBytes / 4] |= value << (8 * (j * Mma::kBytes % 4));
      }
      store_words(target, v);
    }
  }
}

// The 16 x 32-byte fragments of a warp's rows; kFirst: rows first, then k, as the left operand
// wants it.
template <bool kAlongK, bool kRowsFirst>
__device__ __forceinline__ void load_fragment(const char* panel, int row, int step, int lane,
                                              uint32_t (&r)[4]) {
  const int i = lane / 8, inside = lane % 8;
  const int row_half = kRowsFirst ? i % 2 : i / 2, k_half = kRowsFirst ? i / 2 : i % 2;
  uint32_t offset;
  if constexpr (kAlongK) {
    offset = chunk_offset<true>(row + row_half * 8 + inside, step * 2 + k_half);
  } else {
    offset = chunk_offset<false>(step * 16 + k_half * 8 + inside, row / 8 + row_half);
  }
  load_matrices<!kAlongK>(shared_address(panel) + offset, r);
}

// Tiles in groups of eight rows of tiles, so that blocks that run together share operands in L2.
__device__ __forceinline__ void tile_at(int64_t index, int64_t tiles_m, int64_t tiles_n, int64_t* m,
                                        int64_t* n) {
  constexpr int64_t kTall = 8;
  const int64_t group = index / (kTall * tiles_n), first = group * kTall;
  const int64_t tall = tiles_m - first < kTall ? tiles_m - first : kTall;
  const int64_t inside = index - group * kTall * tiles_n;
  *m = first + inside % tall;
  *n = inside / tall;
}

template <class Mma, bool kAAlongK, bool kBAlongK, bool kRowSums>
__global__ void __launch_bounds__(kMmaThreads, 2) mma_kernel(const __grid_constant__ MmaArgs args) {
  extern __shared__ __align__(128) char panels[];  // [kStages][2][kPanelSize]
  constexpr int kDepth = kPanelBytes / Mma::kBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % 2 * 64, warp_n = warp / 2 * 32;
  int64_t tile_m, tile_n;
  tile_at(blockIdx.x, args.tiles_m, args.tiles_n, &tile_m, &tile_n);
  const int64_t m0 = tile_m * kPanelRows, n0 = tile_n * kPanelRows;
  const int64_t panels_k = (args.a.depth + kDepth - 1) / kDepth;

  const auto fetch = [&](int64_t k) {
    if (k < panels_k) {
      char* stage = panels + k % kStages * (2 * kPanelSize);
      fetch_panel<Mma, kAAlongK>(args.a, m0, k * kDepth, stage);
      fetch_panel<Mma, kBAlongK>(args.b, n0, k * kDepth, stage + kPanelSize);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  typename Mma::Sum sums[4][4][4] = {};  // [16 rows][8 columns][fragment]
  [[maybe_unused]] RowSum row_sum = {};  // of the thread's row, by half of the warps
  [[maybe_unused]] const bool sums_row = tile_n == 0 && threadIdx.x < kPanelRows;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s);
  for (int64_t k = 0; k < panels_k; ++k) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    fetch(k + kStages - 1);
    const char* stage = panels + k % kStages * (2 * kPanelSize);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_fragment<kAAlongK, true>(stage, warp_m + i * 16, step, lane, a[i]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_fragment<kBAlongK, false>(stage + kPanelSize, warp_n + j * 16, step, lane, b[j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Mma::multiply(sums[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
        }
      }
    }
    if constexpr (kRowSums) {
      if (sums_row) row_sum.add(stage, threadIdx.x, k, Mma::kType);
    }
  }
  if constexpr (kRowSums) {
    const int64_t m = m0 + threadIdx.x;
    if (sums_row && m < args.a.rows) args.row_sums[m] = row_sum.result();
  }

  const auto swap = [](auto value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); };
  // One copy of the code for all eight chunks; registers cannot be indexed at run time, so it
  // compares.
#pragma unroll 1
  for (int c = 0; c < 8; ++c) {
    typename Mma::Sum pairs[4][2];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (c != k) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) pairs[i / 2][i % 2] = sums[k / 2][i / 2][k % 2 * 2 + i % 2];
    }
    gather_groups(pairs, lane % 4, swap);
    float z[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = static_cast<float>(pairs[i / 2][i % 2]);
    const int64_t m = m0 + warp_m + c / 2 * 16 + c % 2 * 8 + lane / 4;
    if (m < args.a.rows) {
      finish_eight<typename Mma::Sum>(args.finish, m, n0 + warp_n + lane % 4 * 8, z);
    }
  }
}

template <class Mma, bool kAAlongK, bool kBAlongK, bool kRowSums = false>
void launch_mma(const char* op, const Place& place, MmaArgs args) {
  args.tiles_m = (args.a.rows + kPanelRows - 1) / kPanelRows;
  args.tiles_n = (args.b.rows + kPanelRows - 1) / kPanelRows;
  const Grid grid{dim3(static_cast<unsigned>(args.tiles_m * args.tiles_n)), dim3(kMmaThreads),
                  kStages * 2 * kPanelSize};
  launch<MmaArgs>(op, place, mma_kernel<Mma, kAAlongK, kBAlongK, kRowSums>, grid, args);
}

// Whether 16-byte accesses of an operand's lines are possible.
static inline bool lines_aligned(const void* data, int64_t line_stride, int bytes) {
  return is_aligned(data) && line_stride * bytes % 16 == 0;
}

}  // namespace cuda
}  // namespace lowp
