// int8 x int8 -> int32, exact whatever the order of the sums, then the scaled epilogue.
#include "scaled_mm.h"

#include "cpu/amx.h"
#include "cpu/epilogue.h"
#include "cpu/panels.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

#if defined(__AVX512VNNI__)
// vpdpbusd wants its left side unsigned: a + 128, whose surplus of 128 sum(b) is taken off at the
// end.
struct Int8Math {
  using Sum = __m512i;
  static constexpr int kValues = 4;
  static constexpr int kSurplus = 128;
  static constexpr int kChains = 4;  // sums side by side, to hide the latency of vpdpbusd
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load_sum(const float* p) { return _mm512_loadu_si512(p); }
  static void store_sum(float* p, Sum s) { _mm512_storeu_si512(p, s); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum multiply_add(Vec a, Vec b, Sum s) {
    return _mm512_dpbusd_epi32(s, _mm512_castps_si512(a), _mm512_castps_si512(b));
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
  static void prepare_a(float* row, int units) {
    if (cpu::isa() == Isa::amx) return;
    for (int u = 0; u < units; ++u) row[u] = bits_float(float_bits(row[u]) ^ 0x80808080u);
  }
  static void add_offsets(const float* b, int units, int32_t* offsets) {
    const Vec ones = _mm512_castsi512_ps(_mm512_set1_epi8(1));
    Sum sums[kChains][kVecs];
    for (auto& chain : sums) {
      for (Sum& sum : chain) sum = zero();
    }
    for (int u = 0; u < (units + kLanes - 1) / kLanes * kLanes; u += kChains) {
      for (int i = 0; i < kChains; ++i) {
        for (int v = 0; v < kVecs; ++v) {
          sums[i][v] = multiply_add(ones, load(b + (u + i) * kCols + v * kLanes), sums[i][v]);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      int32_t* at = offsets + v * kLanes;
      Sum total = _mm512_loadu_si512(at);
      for (int i = 0; i < kChains; ++i) total = add(total, sums[i][v]);
      _mm512_storeu_si512(at, total);
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
    amx_multiply_column<AmxInt>(a, b, rows, units, first, sums);
    return true;
  }
};
#else
// Pairs of int16, whose products vpmaddwd adds without saturation (vpmaddubsw would saturate).
struct Int8Math {
  static constexpr int kValues = 2;
  static constexpr int kSurplus = 0;
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
  static void prepare_a(float*, int) {}
  static void add_offsets(const float*, int, int32_t*) {}
  static void begin_thread() {}
  static void end_thread() {}
  static bool multiply_column(const float*, const float*, int, int, bool, float*) { return false; }
};
#endif

}  // namespace

void scaled_mm(const ScaledMmArgs& p) {
  const Operand a{p.a, Float::fp32, p.a_row_stride, p.a_k_stride};  // the type is not looked at
  const Operand b{p.b, Float::fp32, p.b_row_stride, p.b_k_stride};
  multiply<Int8Math>(a, b, p.M, p.N, p.K, p.threads,
                     [&](int64_t m, int rows, int64_t n, int cols, Panels& panels) {
                       float col_scale[kBlockN];
                       for (int j = 0; j < cols; ++j)
                         col_scale[j] = p.col_scale[(n + j) * p.col_scale_stride];
                       for (int r = 0; r < rows; ++r) {
                         float* z = panels.sums + r * kBlockN;
                         const float row_scale = p.row_scale[(m + r) * p.row_scale_stride];
                         for (int j = 0; j < cols; ++j) {
                           const uint32_t surplus =
                               uint32_t{Int8Math::kSurplus} * uint32_t(panels.offsets[j]);
                           const int32_t sum = static_cast<int32_t>(float_bits(z[j]) - surplus);
                           z[j] = (static_cast<float>(sum) * row_scale) * col_scale[j];
                         }
                         add_bias(p.epilogue, n, cols, z);
                         finish_run(z, cols, p.epilogue, (m + r) * p.N + n);
                       }
                     });
}

}  // namespace LOWP_ISA
}  // namespace lowp
