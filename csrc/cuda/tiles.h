// Kernels that turn tiles of codes through shared memory, as bodies that host and device both run:
// all threads load a tile of 64 rows and 128 columns, then, with the tile complete, store it by
// columns. A body has Args and load(args, row, column, codes[16]): codes of 16 columns of one row,
// zeros beyond.
#pragma once
#include "cuda/groups.h"

namespace lowp {
namespace cuda {

constexpr int kTileRows = 64, kTileCols = 128;
constexpr int kTilePitch = kTileRows + 16;  // 16-byte rows stay aligned, columns change banks
struct alignas(16) Tile {
  int8_t codes[kTileCols][kTilePitch];
};

struct Turned {
  int64_t rows, cols;  // of what is read
  int8_t* out;         // [cols, rows]
  bool aligned;        // rows % 16 == 0 and out too
};

// Vector v of a tile: one row, 16 columns. A warp's lanes take adjacent rows, whose bytes share
// words.
constexpr int kTileVectors = kTileRows * kTileCols / 16;

template <class Body>
LOWP_HD void load_tile(const typename Body::Args& a, int64_t row0, int64_t col0, int v,
                       Tile& tile) {
  const int row = v % kTileRows, column = v / kTileRows * 16;
  int32_t codes[16];
  Body::load(a, row0 + row, col0 + column, codes);
#pragma unroll
  for (int i = 0; i < 16; ++i) tile.codes[column + i][row] = static_cast<int8_t>(codes[i]);
}

// Vector v of a turned tile: one column, 16 rows.
LOWP_HD void store_tile(const Turned& t, int64_t row0, int64_t col0, int v, const Tile& tile) {
  const int row = v % (kTileRows / 16) * 16, column = v / (kTileRows / 16);
  if (col0 + column >= t.cols) return;
  const Words words = load_words(&tile.codes[column][row]);
  int32_t codes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<int8_t>(words.w[i / 4] >> (8 * (i % 4)));
  const Span rows = span_of<16>(row0 + row, 0, t.rows);
  const int64_t begin = (col0 + column) * t.rows + row0 + row;
  store_codes(codes, Span{begin, rows.from, rows.to}, t.aligned, t.out);
}

struct TileGrid {
  int64_t per_row, tiles;
};
static inline TileGrid tile_grid(int64_t rows, int64_t cols) {
  const int64_t per_row = (cols + kTileCols - 1) / kTileCols;
  return {per_row, per_row * ((rows + kTileRows - 1) / kTileRows)};
}

#ifdef __CUDACC__
template <class Body>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(const __grid_constant__ typename Body::Args args,
                const __grid_constant__ Turned turned, TileGrid grid) {
  __shared__ Tile tile;
  for (int64_t i = blockIdx.x; i < grid.tiles; i += gridDim.x) {
    const Quotient place = divide_index(i, grid.per_row);
    const int64_t row0 = place.quotient * kTileRows, col0 = place.remainder * kTileCols;
#pragma unroll
    for (int v = 0; v < kTileVectors; v += kThreads) {
      load_tile<Body>(args, row0, col0, v + threadIdx.x, tile);
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kTileVectors; v += kThreads) {
      store_tile(turned, row0, col0, v + threadIdx.x, tile);
    }
    __syncthreads();
  }
}

template <class Body>
void launch_tiles(const char* op, const Place& place, const typename Body::Args& args,
                  const Turned& turned) {
  const TileGrid grid = tile_grid(turned.rows, turned.cols);
  constexpr int64_t kMostBlocks = 1 << 30;
  const Grid blocks{
      dim3(static_cast<unsigned>(grid.tiles < kMostBlocks ? grid.tiles : kMostBlocks)),
      dim3(kThreads)};
  launch<typename Body::Args, Turned, TileGrid>(op, place, tile_kernel<Body>, blocks, args, turned,
                                                grid);
}
#else
template <class Body>
void launch_tiles(const char*, const Place&, const typename Body::Args& args,
                  const Turned& turned) {
  const TileGrid grid = tile_grid(turned.rows, turned.cols);
  Tile tile;
  for (int64_t block = 0; block < host_blocks; ++block) {
    for (int64_t i = block; i < grid.tiles; i += host_blocks) {
      const Quotient place = divide_index(i, grid.per_row);
      const int64_t row0 = place.quotient * kTileRows, col0 = place.remainder * kTileCols;
      for (int v = 0; v < kTileVectors; ++v) load_tile<Body>(args, row0, col0, v, tile);
      for (int v = 0; v < kTileVectors; ++v) store_tile(turned, row0, col0, v, tile);
    }
  }
}
#endif

}  // namespace cuda
}  // namespace lowp
