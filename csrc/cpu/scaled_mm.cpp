// int8 x int8 -> int32, exact whatever the order of the sums, then the scaled epilogue.
#include "scaled_mm.h"

#include "cpu/amx.h"
#include "cpu/epilogue.h"
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

}  // namespace

void scaled_mm(const ScaledMmArgs& p) {
  const FreshPages pages(p.epilogue.y, p.M * p.N * (p.epilogue.y_type == Float::fp32 ? 4 : 2));
  const Operand a{p.a, Float::fp32, p.a_row_stride, p.a_k_stride};  // the type is not looked at
  const Operand b{p.b, Float::fp32, p.b_row_stride, p.b_k_stride};
  multiply<Int8Math>(
      a, b, p.M, p.N, p.K, p.threads,
      [&](int64_t m, int rows, int64_t n, int cols, float* sums, const uint32_t* offsets) {
        float col_scale[kBlockN], bias[kBlockN];
        load_bias(p.epilogue, n, cols, bias);
        for (int j = 0; j < cols; ++j) col_scale[j] = p.col_scale[(n + j) * p.col_scale_stride];
        for (int r = 0; r < rows; ++r) {
          float* z = sums + r * kBlockN;
          const float row_scale = p.row_scale[(m + r) * p.row_scale_stride];
          const uint32_t offset = Int8Math::kHasOffsets ? offsets[r] : 0;
          for (int j = 0; j < cols; ++j) {
            const int32_t sum = static_cast<int32_t>(float_bits(z[j]) - offset);
            z[j] = (static_cast<float>(sum) * row_scale) * col_scale[j] + bias[j];
          }
          finish_run(z, cols, p.epilogue, (m + r) * p.N + n);
        }
      });
}

}  // namespace LOWP_ISA
}  // namespace lowp
