// int8 x int8 -> int32, exact whatever the order of the sums, then the scaled epilogue.
#include "scaled_mm.h"

#include "cpu/amx.h"
#include "cpu/epilogue.h"
#include "cpu/few_rows.h"
#include "cpu/pages.h"
#include "cpu/panels.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

#if defined(__AVX512VNNI__)
// vpdpbusd wants one side unsigned: b + 128, whose surplus of 128 sum(a) is taken off at the end.
// So rows of a, the longer side of most products, are read where they lie.
struct Int8Math {
  using Sum = __m512i;
  static constexpr int kValues = 4;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load_sum(const float* p) { return _mm512_loadu_si512(p); }
  static void store_sum(float* p, Sum s) { _mm512_storeu_si512(p, s); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum multiply_add(Vec a, Vec b, Sum s) {
    return _mm512_dpbusd_epi32(s, _mm512_castps_si512(b), _mm512_castps_si512(a));
  }

  static void pack_row(const Operand& x, int64_t at, int values, float* out) {
    out[values / 4] = 0.0f;  // zeros follow the last values
    memcpy(out, static_cast<const int8_t*>(x.data) + at, static_cast<size_t>(values));
  }
  static void pack_across(const Operand& x, int64_t at, int64_t stride, int rows, int values,
                          float* out) {
    const uint8_t* line = static_cast<const uint8_t*>(x.data) + at;
    if (values == kValues) return interleave_bytes(line, stride, rows, out);
    for (int r = 0; r < rows; ++r) {
      uint32_t unit = 0;
      for (int v = 0; v < values; ++v) unit |= uint32_t{line[v * stride + r]} << (8 * v);
      out[r] = bits_float(unit);
    }
  }
  static bool takes_rows(const Operand& x, int64_t K) {
    return x.k_stride == 1 && K % kValues == 0 && cpu::isa() != Isa::amx;  // whole units only
  }
  static uint32_t flip() { return cpu::isa() == Isa::amx ? 0u : 0x80808080u; }  // + 128, by bytes
  static constexpr bool kHasOffsets = true;
  static uint32_t row_offset(const char* row, int units) {
    if (cpu::isa() == Isa::amx) return 0;
    const __m512i ones = _mm512_set1_epi8(1);
    Sum sum = zero();
    for (int u = 0; u < units; u += kLanes) {
      const __mmask16 inside = static_cast<__mmask16>((1u << at_most(units - u, kLanes)) - 1);
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi32(inside, row + 4 * u));
    }
    return 128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum));
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
    amx_multiply_column<AmxInt>(a, b, rows, units, first, sums);
    return true;
  }
};

// Rows of a are shifted by 128 to be unsigned. One more, of nothing but 128, gives what that adds.
class Int8Dots {
 public:
  using Vector = __m512i;
  using Sum = __m512i;
  static constexpr int kStep = 64, kFew = 6;  // 24 vectors of sums

  explicit Int8Dots(const ScaledMmArgs& p)
      : K(p.K),
        M_(p.M),
        b_(p.b),
        b_stride_(p.b_row_stride),
        stride_((p.K + kStep - 1) / kStep * kStep),
        shifted_(
            static_cast<uint8_t*>(aligned_alloc(kStep, static_cast<size_t>((p.M + 1) * stride_)))) {
    for (int64_t m = 0; m <= M_; ++m) shift(m < M_ ? p.a + m * p.a_row_stride : nullptr, m);
  }

  int rows() const { return static_cast<int>(M_) + 1; }
  Vector many(int64_t n, int64_t k) const { return _mm512_loadu_si512(b_ + n * b_stride_ + k); }
  Vector last(int64_t n) const { return load_last(b_ + n * b_stride_); }
  Vector few(int64_t m, int64_t k) const {
    return _mm512_load_si512(shifted_.get() + m * stride_ + k);
  }
  static Sum zero() { return _mm512_setzero_si512(); }
  static void add(Vector few, Vector many, Sum& sum) {  // GCC copies sums for the intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(few), "v"(many));
  }
  static void store(const Sum (&s)[kMany], float* out) {
    const auto halved = [](__m512i x, __m512i y) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    const __m512i a = halved(s[0], s[1]), b = halved(s[2], s[3]);
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }

  const int64_t K;

 private:
  Vector load_last(const int8_t* row) const {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << K % kStep) - 1, row + K / kStep * kStep);
  }
  void shift(const int8_t* row, int64_t m) {  // of zeros where it is null
    const __m512i by = _mm512_set1_epi8(-128);
    for (int64_t k = 0; k < K; k += kStep) {
      __m512i values = _mm512_setzero_si512();
      if (row != nullptr) values = k + kStep <= K ? _mm512_loadu_si512(row + k) : load_last(row);
      _mm512_store_si512(shifted_.get() + m * stride_ + k, _mm512_add_epi8(values, by));
    }
  }

  const int64_t M_;
  const int8_t* const b_;
  const int64_t b_stride_, stride_;
  const std::unique_ptr<uint8_t, Free> shifted_;
};
#else
// Pairs of int16, whose products vpmaddwd adds without saturation (vpmaddubsw would saturate).
struct Int8Math {
  static constexpr int kValues = 2;
#ifdef __AVX2__
  using Sum = __m256i;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum load_sum(const float* p) { return _mm256_castps_si256(load(p)); }
  static void store_sum(float* p, Sum s) { store(p, _mm256_castsi256_ps(s)); }
  static Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static Sum multiply_add(Vec a, Vec b, Sum s) {
    const Sum product = _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
    return _mm256_add_epi32(s, product);
  }
#else
  using Sum = __m128i;
  static Sum zero() { return _mm_setzero_si128(); }
  static Sum load_sum(const float* p) { return _mm_castps_si128(load(p)); }
  static void store_sum(float* p, Sum s) { store(p, _mm_castsi128_ps(s)); }
  static Sum add(Sum a, Sum b) { return _mm_add_epi32(a, b); }
  static Sum multiply_add(Vec a, Vec b, Sum s) {
    return _mm_add_epi32(s, _mm_madd_epi16(_mm_castps_si128(a), _mm_castps_si128(b)));
  }
#endif
  static float unit(int8_t low, int8_t high) {
    return bits_float(static_cast<uint16_t>(low) |
                      static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16);
  }

  static void pack_row(const Operand& x, int64_t at, int values, float* out) {
    const int8_t* row = static_cast<const int8_t*>(x.data) + at;
    for (int i = 0; i < values / 2; ++i) out[i] = unit(row[2 * i], row[2 * i + 1]);
    if (values % 2 != 0) out[values / 2] = unit(row[values - 1], 0);
  }
  static void pack_across(const Operand& x, int64_t at, int64_t stride, int rows, int values,
                          float* out) {
    const int8_t* low = static_cast<const int8_t*>(x.data) + at;
    const int8_t* high = low + stride;
    for (int r = 0; r < rows; ++r) out[r] = unit(low[r], values > 1 ? high[r] : int8_t{0});
  }
  static bool takes_rows(const Operand&, int64_t) { return false; }
  static constexpr uint32_t flip() { return 0; }
  static constexpr bool kHasOffsets = false;
  static uint32_t row_offset(const char*, int) { return 0; }
  static void begin_thread() {}
  static void end_thread() {}
  static bool multiply_column(const float*, const float*, int, int, bool, float*) { return false; }
};
#endif

// z[i] of column n + i = (float(sum) * row_scale) * col_scale[n + i] + bias[n + i], of row m
struct Scaling {
  Scaling(const ScaledMmArgs& args, int64_t first, int count) : p(args), n(first), cols(count) {
    load_bias(p.epilogue, n, cols, bias);
    for (int i = 0; i < cols; ++i) col_scale[i] = p.col_scale[(n + i) * p.col_scale_stride];
  }

  // offset(i): what is taken off sum i
  template <class Offset>
  void finish(int64_t m, float* z, const Offset& offset, bool around = false) const {
    const float row_scale = p.row_scale[m * p.row_scale_stride];
    for (int i = 0; i < cols; ++i) {
      const int32_t sum = static_cast<int32_t>(float_bits(z[i]) - offset(i));
      z[i] = (static_cast<float>(sum) * row_scale) * col_scale[i] + bias[i];
    }
    finish_run(z, cols, p.epilogue, m * p.N + n, around);
  }

  const ScaledMmArgs& p;
  const int64_t n;
  const int cols;
  float col_scale[kBlockN], bias[kBlockN];
};

}  // namespace

void scaled_mm(const ScaledMmArgs& p) {
  const FreshPages pages(p.epilogue.y, p.M * p.N * (p.epilogue.y_type == Float::fp32 ? 4 : 2));
  const Operand a{p.a, Float::fp32, p.a_row_stride, p.a_k_stride};  // the type is not looked at
  const Operand b{p.b, Float::fp32, p.b_row_stride, p.b_k_stride};
#if defined(__AVX512VNNI__)
  if (has_few_rows(a, b, kMostFew - 1, p.M, p.N, p.K)) {
    return multiply_few_rows(
        Int8Dots(p), p.N, p.threads, [&](int64_t n, int cols, ChunkSums& sums) {
          const Scaling scaling(p, n, cols);
          for (int m = 0; m < p.M; ++m) {
            scaling.finish(m, sums[m], [&](int i) { return float_bits(sums[p.M][i]); });
          }
        });
  }
#endif
  const bool around = goes_around(p.epilogue, p.M * p.N);
  multiply<Int8Math>(
      a, b, p.M, p.N, p.K, p.threads,
      [&](int64_t m, int rows, int64_t n, int cols, float* sums, const uint32_t* offsets) {
        const Scaling scaling(p, n, cols);
        for (int r = 0; r < rows; ++r) {
          const uint32_t offset = Int8Math::kHasOffsets ? offsets[r] : 0;
          scaling.finish(m + r, sums + r * kBlockN, [&](int) { return offset; }, around);
        }
        if (around) _mm_sfence();
      });
}

}  // namespace LOWP_ISA
}  // namespace lowp
