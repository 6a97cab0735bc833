// A product of float operands, the epilogue on a block of sums while it is in cache. fp16 and fp32
// are multiplied as fp32, so fp16 runs at the speed of fp32 on any machine; bf16 by the CPU's own
// bf16 instructions where it has them (they take subnormal operands for 0).
#include "linear.h"

#include "cpu/amx.h"
#include "cpu/epilogue.h"
#include "cpu/few_rows.h"
#include "cpu/panels.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

#if defined(__AVX512F__)
Vec round_to_fp16(Vec x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
Vec round_to_fp16(Vec x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
Vec round_to_fp16(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = fp16_to_float(float_to_fp16_rn(x[i]));
  return x;
}
#endif

Vec round_to_bf16(Vec x) {  // as float_to_bf16_rn
  const Bits u = reinterpret_cast<Bits>(x), quiet = (u & 0x80000000u) | 0x7FC00000u;
  const Bits rounded = (u + 0x7FFFu + (u >> 16 & 1u)) & 0xFFFF0000u;
  return reinterpret_cast<Vec>((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

Vec load_bf16(const uint16_t* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Bits) << 16);
}

// fp32(x[at .. at+kLanes)), rounded as a product wants it
template <Float kType, Float kRounded>
Vec load_as(const void* x, int64_t at) {
  const uint16_t* const halves = static_cast<const uint16_t*>(x) + at;
  const Vec v = kType == Float::fp32   ? load(static_cast<const float*>(x) + at)
                : kType == Float::fp16 ? load_fp16(halves)
                                       : load_bf16(halves);
  if (kRounded == kType || kRounded == Float::fp32) return v;
  return kRounded == Float::bf16 ? round_to_bf16(v) : round_to_fp16(v);
}

// out[i] = fp32(x[at + i]), rounded as the product wants it, i < n
template <Float kType, Float kRounded = kType>
inline __attribute__((always_inline)) void load_values(const void* x, int64_t at, int n,
                                                       float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_as<kType, kRounded>(x, at + i));
  if (i == n) return;
  constexpr size_t kSize = kType == Float::fp32 ? sizeof(float) : sizeof(uint16_t);
  char rest[kLanes * kSize] = {};
  float values[kLanes];
  memcpy(rest, static_cast<const char*>(x) + (at + i) * kSize, static_cast<size_t>(n - i) * kSize);
  store(values, load_as<kType, kRounded>(rest, 0));
  memcpy(out + i, values, static_cast<size_t>(n - i) * sizeof(float));
}

template <Float kRounded>
void load_rounded_to(const Operand& x, int64_t at, int n, float* out) {
  if (x.type == Float::fp32) return load_values<Float::fp32, kRounded>(x.data, at, n, out);
  if (x.type == Float::bf16) return load_values<Float::bf16, kRounded>(x.data, at, n, out);
  load_values<Float::fp16, kRounded>(x.data, at, n, out);
}

// Inline where there is nothing to round, since it is two vectors that are loaded at a time.
inline __attribute__((always_inline)) void load_rounded(const Operand& x, int64_t at, int n,
                                                        float* out) {
  const bool as_it_is = x.rounded_to == x.type || x.rounded_to == Float::fp32;
  if (as_it_is && x.type == Float::fp16) return load_values<Float::fp16>(x.data, at, n, out);
  if (as_it_is) return load_floats(x.data, x.type, at, n, out);
  if (x.rounded_to == Float::bf16) return load_rounded_to<Float::bf16>(x, at, n, out);
  load_rounded_to<Float::fp16>(x, at, n, out);
}

struct Fp32Math {
  using Sum = Vec;
  static constexpr int kValues = 1;
  static Sum zero() { return LOWP_ISA::zero(); }
  static Sum load_sum(const float* p) { return load(p); }
  static void store_sum(float* p, Sum s) { store(p, s); }
  static Sum add(Sum a, Sum b) { return LOWP_ISA::add(a, b); }
  static Sum multiply_add(Vec a, Vec b, Sum s) { return LOWP_ISA::multiply_add(a, b, s); }

  static void pack_row(const Operand& x, int64_t at, int values, float* out) {
    load_rounded(x, at, values, out);
  }
  static void pack_across(const Operand& x, int64_t at, int64_t, int rows, int, float* out) {
    if (rows == kCols) return load_rounded(x, at, kCols, out);  // whole registers
    load_rounded(x, at, rows, out);
  }
  static bool takes_rows(const Operand&, int64_t) { return false; }
  static constexpr uint32_t flip() { return 0; }
  static constexpr bool kHasOffsets = false;
  static uint32_t row_offset(const char*, int) { return 0; }
  static void begin_thread() {}
  static void end_thread() {}
  static bool multiply_column(const float*, const float*, int, int, bool, float*) { return false; }
};

#ifdef __AVX512BF16__
struct Bf16Math : Fp32Math {
  static constexpr int kValues = 2;
  static constexpr int kMost = kBlockM > 2 * kDepth ? kBlockM : 2 * kDepth;  // values at a time
  static Sum multiply_add(Vec a, Vec b, Sum s) {
    return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
  }

  // x[at .. at+n) as they lie, or rounded into `held`
  static const uint16_t* values_of(const Operand& x, int64_t at, int n, uint16_t* held) {
    if (x.type == Float::bf16) return static_cast<const uint16_t*>(x.data) + at;
    float wide[kMost];
    load_floats(x.data, x.type, at, n, wide);
    store_floats(wide, n, Float::bf16, held, 0);
    return held;
  }
  static void pack_row(const Operand& x, int64_t at, int values, float* out) {
    uint16_t held[kMost];
    out[values / 2] = 0.0f;  // an odd last value has zero for its partner
    memcpy(out, values_of(x, at, values, held), sizeof(uint16_t) * size_t(values));
  }
  static void pack_across(const Operand& x, int64_t at, int64_t stride, int rows, int values,
                          float* out) {
    uint16_t held[2][kMost];
    const uint16_t* even = values_of(x, at, rows, held[0]);
    const uint16_t* odd = values > 1 ? values_of(x, at + stride, rows, held[1]) : even;
    for (int r = 0; r < rows; ++r) {
      const uint32_t high = values > 1 ? odd[r] : 0u;
      out[r] = bits_float(high << 16 | even[r]);
    }
  }
  static void begin_thread() {
    if (cpu::isa() == Isa::amx) amx_begin();
  }
  static void end_thread() {
    if (cpu::isa() == Isa::amx) amx_end();
  }
  static bool multiply_column(const float* a, const float* b, int rows, int units, bool first,
                              float* sums) {
    if (cpu::isa() != Isa::amx) return false;
    amx_multiply_column<AmxFloat>(a, b, rows, units, first, sums);
    return true;
  }
};
#else
using Bf16Math = Fp32Math;
#endif

// Rows of a become fp32 once, with zeros behind them; rows of b as they are read.
template <Float kType, Float kRounded>
class FloatDots {
 public:
  using Vector = Vec;
  using Sum = Vec;
  static constexpr int kStep = kLanes, kFew = 4;

  explicit FloatDots(const ProductArgs& p)
      : K(p.K),
        M_(p.M),
        b_(p.b),
        stride_((p.K + kStep - 1) / kStep * kStep),
        few_(static_cast<float*>(
            aligned_alloc(64, static_cast<size_t>((p.M * stride_ * 4 + 63) / 64 * 64)))) {
    for (int64_t m = 0; m < M_; ++m) {
      float* const row = few_.get() + m * stride_;
      load_rounded(p.a, m * p.a.row_stride, static_cast<int>(K), row);
      for (int64_t k = K; k < stride_; ++k) row[k] = 0.0f;
    }
  }

  int rows() const { return static_cast<int>(M_); }
  Vector many(int64_t n, int64_t k) const {
    return load_as<kType, kRounded>(b_.data, n * b_.row_stride + k);
  }
  Vector last(int64_t n) const {
    const int count = static_cast<int>(K % kStep);
    float values[kLanes] = {};
    load_values<kType, kRounded>(b_.data, n * b_.row_stride + K - count, count, values);
    return load(values);
  }
  Vector few(int64_t m, int64_t k) const { return load(few_.get() + m * stride_ + k); }
  static Sum zero() { return LOWP_ISA::zero(); }
  static void add(Vector few, Vector many, Sum& sum) { sum = multiply_add(few, many, sum); }
  static void store(const Sum (&s)[kMany], float* out) {
    for (int i = 0; i < kMany; ++i) {
      float lanes[kLanes];
      LOWP_ISA::store(lanes, s[i]);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      }
      out[i] = lanes[0];
    }
  }

  const int64_t K;

 private:
  const int64_t M_;
  const Operand b_;
  const int64_t stride_;
  const std::unique_ptr<float, Free> few_;
};

// body(dots), or false where packed panels are faster. What b is rounded from does not matter.
template <Float kRounded, class Body>
bool with_few_rows_of(const ProductArgs& p, const Body& body) {
  if (p.b.type == Float::fp32) return body(FloatDots<Float::fp32, kRounded>(p)), true;
  if (p.b.type == Float::bf16) return body(FloatDots<Float::bf16, kRounded>(p)), true;
  return body(FloatDots<Float::fp16, kRounded>(p)), true;
}
template <class Body>
bool with_few_rows(const ProductArgs& p, const Body& body) {
  constexpr int64_t kFewRows = 8;
  if (!has_few_rows(p.a, p.b, kFewRows, p.M, p.N, p.K)) return false;
  if (p.b.rounded_to == Float::bf16) return with_few_rows_of<Float::bf16>(p, body);
  return p.b.rounded_to == Float::fp16 && with_few_rows_of<Float::fp16>(p, body);
}

}  // namespace

void product(const ProductArgs& p) {
  const bool around = goes_around(p.epilogue, p.M * p.N);
  const auto finish_rows = [&](int64_t m, int64_t rows, int64_t n, int cols, float* sums,
                               int64_t stride) {
    float bias[kBlockN];
    load_bias(p.epilogue, n, cols, bias);
    for (int64_t r = 0; r < rows; ++r) {
      float* z = sums + r * stride;
      for (int j = 0; j < cols; ++j) z[j] += bias[j];
      finish_run(z, cols, p.epilogue, (m + r) * p.N + n, around);
    }
    if (around) _mm_sfence();
  };
  const bool is_done = with_few_rows(p, [&](const auto& dots) {
    multiply_few_rows(dots, p.N, p.threads, [&](int64_t n, int cols, ChunkSums& sums) {
      finish_rows(0, p.M, n, cols, sums[0], kChunk);
    });
  });
  if (is_done) return;
  const auto finish = [&](int64_t m, int rows, int64_t n, int cols, float* sums, const uint32_t*) {
    finish_rows(m, rows, n, cols, sums, kBlockN);
  };
  if (p.a.rounded_to == Float::bf16 && p.b.rounded_to == Float::bf16) {
    multiply<Bf16Math>(p.a, p.b, p.M, p.N, p.K, p.threads, finish);
  } else {
    multiply<Fp32Math>(p.a, p.b, p.M, p.N, p.K, p.threads, finish);
  }
}

void linear_epilogue(const EpilogueArgs& a) {
  parallel_for(a.M, a.N > 4096 ? 1 : 4096 / (a.N + 1) + 1, a.threads,
               [&](int64_t begin, int64_t end) {
                 float z[kRun], bias[kRun];
                 for (int64_t m = begin; m < end; ++m) {
                   for (int64_t n = 0; n < a.N; n += kRun) {
                     const int cols = at_most(a.N - n, kRun);
                     load_floats(a.sums, Float::fp32, m * a.N + n, cols, z);
                     load_bias(a.epilogue, n, cols, bias);
                     for (int j = 0; j < cols; ++j) z[j] += bias[j];
                     finish_run(z, cols, a.epilogue, m * a.N + n);
                   }
                 }
               });
}

}  // namespace LOWP_ISA
}  // namespace lowp
