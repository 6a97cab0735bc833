// Runs of an optimizer's tensors: what a run is, and how states of any type are loaded and stored.
// Included inside every instruction set's translation unit.
#pragma once
#include <math.h>
#include <stdlib.h>

#include "adamw.h"
#include "cpu/draws.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "numerics/codec.h"

namespace lowp {
namespace LOWP_ISA {

// A run is kRun elements, or one block of codes, which lies in one row.
static inline int64_t runs_of(int64_t rows, int64_t cols, bool codes) {
  if (codes) return rows * ((cols + kStateBlock - 1) / kStateBlock);
  return (rows * cols + kRun - 1) / kRun;
}

struct Run {
  int64_t begin;  // element
  int64_t block;  // index into the scales
  int n;
};

static inline Run run_at(int64_t index, int64_t rows, int64_t cols, bool codes) {
  if (!codes) {
    const int64_t begin = index * kRun, left = rows * cols - begin;
    return {begin, 0, static_cast<int>(left < kRun ? left : kRun)};
  }
  const int64_t per_row = (cols + kStateBlock - 1) / kStateBlock;
  const int64_t row = index / per_row, first = index % per_row * kStateBlock;
  const int64_t left = cols - first;
  return {row * cols + first, index, static_cast<int>(left < kStateBlock ? left : kStateBlock)};
}

// body(tensor, run) for every run of every tensor; tensors have .rows, .cols and .state_type.
template <class Tensor, class Body>
static inline void for_each_run(const Tensor* tensors, int64_t count, int threads,
                                const Body& body) {
  const auto is_codes = [&](int64_t t) { return tensors[t].state_type == int64_t(State::codes); };
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    total += runs_of(tensors[t].rows, tensors[t].cols, is_codes(t));
  }
  parallel_for(total, 8, threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // run number of tensor t's first run
    for (int64_t t = 0; t < count && first < end; ++t) {
      const int64_t runs = runs_of(tensors[t].rows, tensors[t].cols, is_codes(t));
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < runs ? end - first : runs;
      for (int64_t i = from; i < to; ++i) {
        body(t, run_at(i, tensors[t].rows, tensors[t].cols, is_codes(t)));
      }
      first += runs;
    }
  });
}

static inline float block_scale(const float* x, int n) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    amax = a > amax ? a : amax;
  }
  return state_scale(amax);
}

// A first moment: floats, or signed codes.
static inline void load_signed(const void* state, const float* scale, int64_t type, const Run& r,
                               float* x) {
  if (type != int64_t(State::codes)) return load_floats(state, Float(type), r.begin, r.n, x);
  const int8_t* codes = static_cast<const int8_t*>(state) + r.begin;
  const float s = scale[r.block];
  for (int i = 0; i < r.n; ++i) x[i] = decode_signed(codes[i], s);
}

// A second moment: floats, or unsigned codes of its square root.
static inline void load_squares(const void* state, const float* scale, int64_t type, const Run& r,
                                float* x) {
  if (type != int64_t(State::codes)) return load_floats(state, Float(type), r.begin, r.n, x);
  const uint8_t* codes = static_cast<const uint8_t*>(state) + r.begin;
  const float s = scale[r.block];
  for (int i = 0; i < r.n; ++i) {
    const float root = decode_unsigned(codes[i], s);
    x[i] = root * root;
  }
}

// draws: null for nearest
static inline void store_any(const float* x, const uint16_t* draws, int64_t type, const Run& r,
                             void* out) {
  if (draws == nullptr) {
    store_floats(x, r.n, Float(type), out, r.begin);
  } else {
    store_floats_sr(x, draws, r.n, Float(type), out, r.begin);
  }
}

static inline void store_signed(const float* x, const uint16_t* draws, int64_t type, const Run& r,
                                void* state, float* scale) {
  if (type != int64_t(State::codes)) return store_any(x, draws, type, r, state);
  int8_t* codes = static_cast<int8_t*>(state) + r.begin;
  const int n = r.n;  // read through r it could alias the codes, and the loop would stay scalar
  const float s = block_scale(x, n);
  scale[r.block] = s;
  if (draws == nullptr) {
    for (int i = 0; i < n; ++i) codes[i] = encode_signed(x[i], s, kNearest);
  } else {
    for (int i = 0; i < n; ++i) codes[i] = encode_signed(x[i], s, draws[i]);
  }
}

static inline void store_squares(const float* x, const uint16_t* draws, int64_t type, const Run& r,
                                 void* state, float* scale) {
  if (type != int64_t(State::codes)) return store_any(x, draws, type, r, state);
  uint8_t* codes = static_cast<uint8_t*>(state) + r.begin;
  const int n = r.n;
  float root[kStateBlock];
  for (int i = 0; i < n; ++i) root[i] = sqrtf(x[i]);
  const float s = block_scale(root, n);
  scale[r.block] = s;
  if (draws == nullptr) {
    for (int i = 0; i < n; ++i) codes[i] = encode_unsigned(root[i], s, kNearest);
  } else {
    for (int i = 0; i < n; ++i) codes[i] = encode_unsigned(root[i], s, draws[i]);
  }
}

// The draws of one run for one role; null where they are not needed.
class RunDraws {
 public:
  const uint16_t* of(bool wanted, uint64_t seed, int64_t step, int64_t id, uint32_t role,
                     int64_t element, int n) {
    if (!wanted) return nullptr;
    const PhiloxKey key{seed, static_cast<uint32_t>(step), static_cast<uint32_t>(id), role};
    return draws_.fill(key, element, n);
  }

 private:
  Draws draws_;
};

}  // namespace LOWP_ISA
}  // namespace lowp
