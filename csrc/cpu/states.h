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
#include "numerics/master.h"

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

struct Shape {
  int64_t rows, cols;
  bool codes;
};

// body(tensor, from, to) for runs that together are those of tensors 0 .. count-1
template <class ShapeOf, class Body>
static inline void for_each_span_of(int64_t count, const ShapeOf& shape_of, int threads,
                                    const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    const Shape s = shape_of(t);
    total += runs_of(s.rows, s.cols, s.codes);
  }
  parallel_for(total, 8, threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // run number of tensor t's first run
    for (int64_t t = 0; t < count && first < end; ++t) {
      const Shape s = shape_of(t);
      const int64_t runs = runs_of(s.rows, s.cols, s.codes);
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < runs ? end - first : runs;
      if (from < to) body(t, from, to);
      first += runs;
    }
  });
}

// body(tensor, run) for every run
template <class ShapeOf, class Body>
static inline void for_each_run_of(int64_t count, const ShapeOf& shape_of, int threads,
                                   const Body& body) {
  for_each_span_of(count, shape_of, threads, [&](int64_t t, int64_t from, int64_t to) {
    const Shape s = shape_of(t);
    for (int64_t i = from; i < to; ++i) body(t, run_at(i, s.rows, s.cols, s.codes));
  });
}

// The same of an optimizer's tensors, which have .rows, .cols and .state_type.
template <class Tensor>
static inline Shape shape_of(const Tensor& t) {
  return {t.rows, t.cols, t.state_type == int64_t(State::codes)};
}

template <class Tensor, class Body>
static inline void for_each_run(const Tensor* tensors, int64_t count, int threads,
                                const Body& body) {
  for_each_run_of(count, [&](int64_t t) { return shape_of(tensors[t]); }, threads, body);
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

static inline MasterWeight master_of(const MasterWeight* masters, int64_t index) {
  return masters == nullptr ? MasterWeight{nullptr, int64_t(Master::none)} : masters[index];
}

// A weight with what its master adds.
static inline void load_weight(const void* param, int64_t type, const MasterWeight& master,
                               const Run& r, float* x) {
  const int n = r.n;
  if (master.kind == int64_t(Master::remainder)) {
    const uint16_t* high = static_cast<const uint16_t*>(param) + r.begin;
    const uint16_t* low = static_cast<const uint16_t*>(master.data) + r.begin;
    for (int i = 0; i < n; ++i) x[i] = join_parts(high[i], low[i]);
    return;
  }
  load_floats(param, Float(type), r.begin, n, x);
  if (master.kind == int64_t(Master::kahan)) {
    float lost[kRun];
    load_floats(master.data, Float(type), r.begin, n, lost);
    for (int i = 0; i < n; ++i) x[i] += lost[i];
  }
}

// With Kahan's compensation (Zamirai et al., "Revisiting BFloat16 training", 2020, section 3) the
// weight is rounded to nearest, and the draws belong to what that loses. A weight that became Inf
// loses nothing.
static inline void store_weight(const float* x, const uint16_t* draws, int64_t type,
                                const MasterWeight& master, const Run& r, void* param) {
  const int n = r.n;
  if (master.kind == int64_t(Master::remainder)) {
    uint16_t* high = static_cast<uint16_t*>(param) + r.begin;
    uint16_t* low = static_cast<uint16_t*>(master.data) + r.begin;
    for (int i = 0; i < n; ++i) high[i] = high_part(x[i]);
    for (int i = 0; i < n; ++i) low[i] = low_part(x[i]);
  } else if (master.kind == int64_t(Master::kahan)) {
    float lost[kRun];
    store_any(x, nullptr, type, r, param);
    load_floats(param, Float(type), r.begin, n, lost);
    for (int i = 0; i < n; ++i) {
      const float rest = canonical_nan(x[i] - lost[i]);
      lost[i] = (float_bits(lost[i]) & 0x7FFFFFFFu) == 0x7F800000u ? 0.0f : rest;
    }
    store_any(lost, draws, type, r, master.data);
  } else {
    store_any(x, draws, type, r, param);
  }
}

// The draws of one run of a tensor that has .step, .id and .offset; each call replaces the last.
template <class Tensor>
class RunDraws {
 public:
  RunDraws(uint64_t seed, const Tensor& t, const Run& r) : seed_(seed), t_(t), r_(r) {}

  // Null where nothing is rounded stochastically.
  const uint16_t* of(Rounding rounding, uint32_t role, int64_t type) {
    if (rounding != Rounding::stochastic || type == int64_t(Float::fp32)) return nullptr;
    const PhiloxKey key{seed_, static_cast<uint32_t>(t_.step), static_cast<uint32_t>(t_.id), role};
    return draws_.fill(key, t_.offset + r_.begin, r_.n);
  }

  const uint16_t* of_weight(Rounding rounding, const MasterWeight& master) {
    if (master.kind == int64_t(Master::remainder)) return nullptr;
    return of(rounding, 0, t_.param_type);
  }

 private:
  const uint64_t seed_;
  const Tensor& t_;
  const Run& r_;
  Draws draws_;
};

}  // namespace LOWP_ISA
}  // namespace lowp
