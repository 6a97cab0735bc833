// A product of float operands, the epilogue on a block of sums while it is in cache. fp16 and fp32
// are multiplied as fp32, so fp16 runs at the speed of fp32 on any machine; bf16 by the CPU's own
// bf16 instructions where it has them (they take subnormal operands for 0).
#include "linear.h"

#include "cpu/amx.h"
#include "cpu/epilogue.h"
#include "cpu/panels.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kHalves = 16;  // that one instruction converts
void widen_halves(const uint16_t* p, float* out) {
  store(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
void round_to_halves(float* p) {
  store(p, _mm512_cvtph_ps(_mm512_cvtps_ph(load(p), _MM_FROUND_TO_NEAREST_INT)));
}
#elif defined(__F16C__)
constexpr int kHalves = 8;
void widen_halves(const uint16_t* p, float* out) {
  store(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
void round_to_halves(float* p) {
  store(p, _mm256_cvtph_ps(_mm256_cvtps_ph(load(p), _MM_FROUND_TO_NEAREST_INT)));
}
#else
constexpr int kHalves = 1;
void widen_halves(const uint16_t* p, float* out) { *out = fp16_to_float(*p); }
void round_to_halves(float* p) { *p = fp16_to_float(float_to_fp16_rn(*p)); }
#endif

// The value of float_to_bf16_rn(x), without a narrower type between that vectors would be shuffled
// for.
float round_to_bf16(float x) {
  const uint32_t u = float_bits(x), quiet = (u & 0x80000000u) | 0x7FC00000u;
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u;
  return bits_float((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

// out[i] = fp32(x[at + i]), rounded as the product wants it, i < n
inline void load_rounded(const Operand& x, int64_t at, int n, float* out) {
  const int whole = n / kHalves * kHalves;
  int first = 0;
  if (x.type == Float::fp16) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
    for (; first < whole; first += kHalves) widen_halves(p + first, out + first);
  }
  load_floats(x.data, x.type, at + first, n - first, out + first);
  if (x.rounded_to == x.type || x.rounded_to == Float::fp32) return;
  if (x.rounded_to == Float::bf16) {
    for (int i = 0; i < n; ++i) out[i] = round_to_bf16(out[i]);
    return;
  }
  for (first = 0; first < whole; first += kHalves) round_to_halves(out + first);
  for (; first < n; ++first) out[first] = fp16_to_float(float_to_fp16_rn(out[first]));
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

}  // namespace

void product(const ProductArgs& p) {
  const auto finish = [&](int64_t m, int rows, int64_t n, int cols, float* sums, const uint32_t*) {
    float bias[kBlockN];
    load_bias(p.epilogue, n, cols, bias);
    for (int r = 0; r < rows; ++r) {
      float* z = sums + r * kBlockN;
      for (int j = 0; j < cols; ++j) z[j] += bias[j];
      finish_run(z, cols, p.epilogue, (m + r) * p.N + n);
    }
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
