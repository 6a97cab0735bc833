// Runs of an optimizer's tensors: a run is up to 256 elements, taken by 16 lanes with 16 each, and
// one block where states are codes. One launch covers the runs of all tensors.
#pragma once
#include <math.h>

#include "cuda/groups.h"
#include "cuda/noise.h"
#include "numerics/codec.h"
#include "numerics/master.h"

namespace lowp {
namespace cuda {

constexpr int kRunLanes = kStateBlock / 16;

struct Run {
  int64_t tensor;      // index into the table
  int64_t block;       // index into the scales
  int64_t begin, end;  // elements of the tensor
};

// The tensor whose runs include `index`, by bisection.
LOWP_HD int64_t tensor_of(const int64_t* first_run, int64_t count, int64_t index) {
  int64_t low = 0, high = count;  // first_run[low] <= index < first_run[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_run[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One of the runs of `length` elements of a tensor that is taken as one row.
LOWP_HD Run flat_run(int64_t tensor, int64_t run, int64_t length, int64_t numel) {
  const int64_t begin = run * length;
  return {tensor, 0, begin, begin + length < numel ? begin + length : numel};
}

template <class Tensor>
LOWP_HD Run run_at(const UpdateTable<Tensor>& table, int64_t index) {
  const int64_t low = tensor_of(table.first_run, table.count, index);
  const Tensor& t = table.tensors[low];
  const int64_t run = index - table.first_run[low];
  if (t.state_type != int64_t(State::codes)) {
    return flat_run(low, run, kStateBlock, t.rows * t.cols);
  }
  const Quotient q = divide_index(run, (t.cols + kStateBlock - 1) / kStateBlock);
  const int64_t first = q.remainder * kStateBlock;
  const int64_t last = first + kStateBlock < t.cols ? first + kStateBlock : t.cols;
  return {low, run, q.quotient * t.cols + first, q.quotient * t.cols + last};
}

LOWP_HD bool vector_aligned(const void* p, const Span& s) {
  return is_aligned(p) && s.begin % 16 == 0;
}

// A first moment: floats, or signed codes with one scale.
LOWP_HD void load_signed(const void* state, float scale, int64_t type, const Span& s, float* x) {
  const bool aligned = vector_aligned(state, s);
  if (type != int64_t(State::codes)) return load_floats<16>(state, Float(type), s, aligned, x);
  int32_t codes[16];
  load_codes(static_cast<const int8_t*>(state), s, aligned, codes);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = decode_signed(static_cast<int8_t>(codes[i]), scale);
}

// A second moment: floats, or unsigned codes of its square root.
LOWP_HD void load_squares(const void* state, float scale, int64_t type, const Span& s, float* x) {
  const bool aligned = vector_aligned(state, s);
  if (type != int64_t(State::codes)) return load_floats<16>(state, Float(type), s, aligned, x);
  int32_t codes[16];
  load_codes(static_cast<const uint8_t*>(state), s, aligned, codes);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float root = decode_unsigned(static_cast<uint8_t>(codes[i]), scale);
    x[i] = root * root;
  }
}

// What a tensor draws, of which only the role changes.
struct StateNoise {
  uint64_t seed;
  uint32_t step, id;
  int64_t element;  // global index of the vector's first
  LOWP_HD_MEMBER void fill(uint32_t role, uint32_t* draws) const {
    fill_draws<16>(PhiloxKey{seed, step, id, role}, static_cast<uint64_t>(element), draws);
  }
};

template <class Tensor>
LOWP_HD StateNoise noise_of(uint64_t seed, const Tensor& t, const Span& s) {
  return {seed, static_cast<uint32_t>(t.step), static_cast<uint32_t>(t.id), t.offset + s.begin};
}

LOWP_HD void store_any(const float* x, bool stochastic, const StateNoise& noise, uint32_t role,
                       int64_t type, const Span& s, void* out) {
  const bool aligned = vector_aligned(out, s);
  if (!stochastic || type == int64_t(Float::fp32)) {
    return store_floats<16>(x, nullptr, Float(type), s, aligned, out);
  }
  uint32_t draws[16];
  noise.fill(role, draws);
  store_floats<16>(x, draws, Float(type), s, aligned, out);
}

// A weight with what its master adds. The master of a remainder is read as bf16, for its bits.
LOWP_HD void load_weight(const void* param, int64_t type, const MasterWeight& master, const Span& s,
                         float* x) {
  load_floats<16>(param, Float(type), s, vector_aligned(param, s), x);
  if (master.kind == int64_t(Master::none)) return;
  const bool remainder = master.kind == int64_t(Master::remainder);
  float rest[16];
  load_floats<16>(master.data, remainder ? Float::bf16 : Float(type), s,
                  vector_aligned(master.data, s), rest);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint16_t high = static_cast<uint16_t>(float_bits(x[i]) >> 16);
    const uint16_t low = static_cast<uint16_t>(float_bits(rest[i]) >> 16);
    x[i] = remainder ? join_parts(high, low) : x[i] + rest[i];
  }
}

// With Kahan's compensation (Zamirai et al., "Revisiting BFloat16 training", 2020, section 3) the
// weight is rounded to nearest, and the draws belong to what that loses. A weight that became Inf
// loses nothing.
LOWP_HD void store_weight(const float* x, bool stochastic, const StateNoise& noise, int64_t type,
                          const MasterWeight& master, const Span& s, void* param) {
  if (master.kind == int64_t(Master::none)) {
    return store_any(x, stochastic, noise, 0, type, s, param);
  }
  if (master.kind == int64_t(Master::remainder)) {
    uint32_t high[16], low[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      high[i] = high_part(x[i]);
      low[i] = low_part(x[i]);
    }
    store_halves<16>(high, s, vector_aligned(param, s), param);
    store_halves<16>(low, s, vector_aligned(master.data, s), master.data);
    return;
  }
  store_any(x, false, noise, 0, type, s, param);
  float lost[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float kept = half_to_float(float_to_half(x[i], Float(type), kToNearest), Float(type));
    const float rest = canonical_nan(x[i] - kept);
    lost[i] = (float_bits(kept) & 0x7FFFFFFFu) == 0x7F800000u ? 0.0f : rest;
  }
  store_any(lost, stochastic, noise, 0, type, s, master.data);
}

// x: a first moment, or the square root of a second one; kSigned tells which. scale: state_scale of
// its block.
template <bool kSigned>
LOWP_HD void store_codes_of(const float* x, bool stochastic, const StateNoise& noise, uint32_t role,
                            float scale, const Span& s, void* state) {
  uint32_t draws[16];
  if (stochastic) {
    noise.fill(role, draws);
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) draws[i] = kNearest;
  }
  int32_t codes[16];
  const bool aligned = vector_aligned(state, s);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    codes[i] =
        kSigned ? encode_signed(x[i], scale, draws[i]) : encode_unsigned(x[i], scale, draws[i]);
  }
  if (kSigned) {
    store_codes(codes, s, aligned, static_cast<int8_t*>(state));
  } else {
    store_codes(codes, s, aligned, static_cast<uint8_t*>(state));
  }
}

// A state, rounded once: floats, or codes of a block whose largest bits are `most`; the block's
// first lane writes its scale.
template <bool kSigned>
LOWP_HD void store_state(const float* x, bool stochastic, const StateNoise& noise, uint32_t role,
                         int64_t type, uint32_t most, bool first, const Span& s, void* state,
                         float* scale) {
  if (type != int64_t(State::codes)) return store_any(x, stochastic, noise, role, type, s, state);
  const float amax = state_scale(most);
  if (first) *scale = amax;
  store_codes_of<kSigned>(x, stochastic, noise, role, amax, s, state);
}

// The largest bits inside of a span: a block's maximum must not see what lies beyond its row.
LOWP_HD uint32_t amax_inside(const float* x, const Span& s) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    most = s.holds(i) && a > most ? a : most;
  }
  return most;
}

// base^n by squaring, as lowp/reference/adamw.py has it: IEEE products alone, so the same bits.
LOWP_HD double power(double base, int64_t n) {
  double result = 1.0;
  while (n > 0) {
    if (n & 1) result = result * base;
    base = base * base;
    n >>= 1;
  }
  return result;
}

// Before an update: counts it in every step, and turns what lies in device memory into the kernels'
// scalars.
template <class Tensor>
struct Clock {
  struct Args {
    UpdateClock clock;
    UpdateTable<Tensor> table;
  };
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& a, int64_t i, int, Lane&) {
    const UpdateClock& c = a.clock;
    if (c.found_inf != nullptr && *c.found_inf != 0.0f) {
      a.table.tensors[i].step = 0;
      return;
    }
    const float now = *a.table.steps[i] + 1.0f;
    *a.table.steps[i] = now;
    a.table.tensors[i].step = static_cast<int64_t>(now);
    const double lr = c.lr_pointer != nullptr ? *c.lr_pointer : c.lr;
    const double bc1 = 1.0 - power(c.beta1, static_cast<int64_t>(now));
    const double bc2 = 1.0 - power(c.beta2, static_cast<int64_t>(now));
    a.table.scalars[i] = {static_cast<float>(lr / bc1), static_cast<float>(1.0 / sqrt(bc2))};
    if (i > 0) return;
    const double scale = c.grad_scale != nullptr ? *c.grad_scale : 1.0;
    *a.table.shared = {static_cast<float>(lr), static_cast<float>(1.0 / scale),
                       static_cast<float>(1.0 - lr * c.weight_decay), 0.0f};
  }
};

}  // namespace cuda
}  // namespace lowp
