// Stands for the GPU's matrix instructions in the host build of the CUDA kernels: the sums by plain
// loops, laid out in quads of lanes as mma leaves them, then the kernels' own code for everything
// after a sum, and for the sums of rows out of panels.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/finish.h"
#include "cuda/groups.h"
#include "cuda/panels.h"
#include "numerics/divide.h"

#include <math.h>
#include <pybind11/pybind11.h>

namespace lowp {
namespace cuda {

int64_t host_blocks = 1;

namespace {

// gather_groups on four lanes at once. Every lane's sends are recorded and replayed until they
// settle: what is sent in its second stage depends on what the first one received.
template <class Value>
void gather_quad(Value (&lanes)[4][4][2]) {
  std::vector<Value> sent[4];
  Value done[4][4][2];
  for (int pass = 0; pass < 3; ++pass) {
    std::vector<Value> next[4];
    for (int q = 0; q < 4; ++q) {
      std::copy(&lanes[q][0][0], &lanes[q][0][0] + 8, &done[q][0][0]);
      gather_groups(done[q], q, [&](Value value, int bit) {
        next[q].push_back(value);
        const size_t index = next[q].size() - 1;
        return pass == 0 ? Value{} : sent[q ^ bit][index];
      });
    }
    for (int q = 0; q < 4; ++q) sent[q] = next[q];
  }
  std::copy(&done[0][0][0], &done[0][0][0] + 32, &lanes[0][0][0]);
}

// sum(m, n) of every element, 32 columns at a time.
template <class Value, class Sum>
void finish_all(const Finish& f, int64_t M, const Sum& sum) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < f.N; n += 32) {
      Value lanes[4][4][2];
      for (int q = 0; q < 4; ++q) {
        for (int g = 0; g < 4; ++g) {
          for (int i = 0; i < 2; ++i) {
            const int64_t column = n + 8 * g + 2 * q + i;
            lanes[q][g][i] = column < f.N ? sum(m, column) : Value{};
          }
        }
      }
      gather_quad(lanes);
      for (int q = 0; q < 4; ++q) {
        float z[8];
        for (int i = 0; i < 8; ++i) z[i] = static_cast<float>(lanes[q][i / 2][i % 2]);
        finish_eight<Value>(f, m, n + 8 * q, z);
      }
    }
  }
}

float element(const Operand& x, int64_t row, int64_t k) {
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[row * x.row_stride + k * x.k_stride];
  return half_to_float(bits, x.type);
}

// The sums of 128 rows as the block of their tile takes them, panel after panel.
void sum_rows(const Operand& x, int64_t row0, int64_t rows, int64_t K, float* sums) {
  RowSum row_sums[kPanelRows] = {};
  for (int64_t k = 0; k * RowSum::kDepth < K; ++k) {
    alignas(16) char panel[kPanelSize] = {};
    for (int i = 0; i < RowSum::kDepth && k * RowSum::kDepth + i < K; ++i) {
      for (int row = 0; row < kPanelRows && row0 + row < rows; ++row) {
        const uint16_t* value = static_cast<const uint16_t*>(x.data) + (row0 + row) * x.row_stride +
                                (k * RowSum::kDepth + i) * x.k_stride;
        memcpy(panel + i * 256 + ((row / 8) ^ (i % 8)) * 16 + row % 8 * 2, value, 2);
      }
    }
    for (int row = 0; row < kPanelRows; ++row) row_sums[row].add(panel, row, k, x.type);
  }
  for (int row = 0; row < kPanelRows && row0 + row < rows; ++row) {
    sums[row0 + row] = row_sums[row].result();
  }
}

}  // namespace

bool product(const Place&, const ProductArgs& p, float* row_sums) {
  if (p.a.type == Float::fp32) throw std::invalid_argument("lowp::linear: fp32 is torch's");
  const Finish finish{p.epilogue, p.N, nullptr, 0, nullptr, 0, rows_aligned(p.epilogue, p.N)};
  finish_all<float>(finish, p.M, [&](int64_t m, int64_t n) {
    float sum = 0.0f;
    for (int64_t k = 0; k < p.K; ++k) sum += element(p.a, m, k) * element(p.b, n, k);
    return sum;
  });
  if (row_sums == nullptr || p.N == 0 || p.a.k_stride == 1 || p.b.k_stride == 1) return false;
  for (int64_t row0 = 0; row0 < p.M; row0 += kPanelRows) {
    sum_rows(p.a, row0, p.M, p.K, row_sums);
  }
  return true;
}

void scaled_mm(const Place&, const ScaledMmArgs& p) {
  if (p.a_k_stride != 1 || p.b_k_stride != 1) {
    throw std::invalid_argument("lowp::scaled_mm: the CUDA product takes codes adjacent along K");
  }
  const Finish finish{p.epilogue,
                      p.N,
                      p.row_scale,
                      p.row_scale_stride,
                      p.col_scale,
                      p.col_scale_stride,
                      rows_aligned(p.epilogue, p.N)};
  finish_all<int32_t>(finish, p.M, [&](int64_t m, int64_t n) {
    int32_t sum = 0;
    const int8_t *a = p.a + m * p.a_row_stride, *b = p.b + n * p.b_row_stride;
    for (int64_t k = 0; k < p.K; ++k) sum += a[k] * b[k];
    return sum;
  });
}

float fused(float x, float y, float z) { return fmaf(x, y, z); }

// Reciprocals that are `ulps` units in the last place off; exact of a power of two, and of the
// largest mantissa, which Markstein's theorem excepts: nvcc's own division, the same sequence,
// relies on it too.
struct NearReciprocal {
  int ulps;
  float operator()(float x) const {
    const uint32_t mantissa = float_bits(x) & 0x7FFFFFu;
    const bool is_exact = mantissa == 0 || mantissa == 0x7FFFFFu;
    return bits_float(float_bits(1.0f / x) + static_cast<uint32_t>(is_exact ? 0 : ulps));
  }
};

bool same_or_nan(float got, float want) {
  return float_bits(got) == float_bits(want) || (got != got && want != want);
}

// divide_inline of pairs.
int64_t wrong_divisions(const std::vector<float>& a, const std::vector<float>& b, int ulps) {
  int64_t wrong = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float got = divide_inline(a[i], b[i], fused, NearReciprocal{ulps});
    wrong += same_or_nan(got, a[i] / b[i]) ? 0 : 1;
  }
  return wrong;
}

int64_t wrong_reciprocals(const std::vector<float>& b, int ulps) {
  int64_t wrong = 0;
  for (float value : b) {
    const float got = reciprocal_inline(value, fused, NearReciprocal{ulps});
    wrong += same_or_nan(got, 1.0f / value) ? 0 : 1;
  }
  return wrong;
}

void define_host(pybind11::module_& m) {
  m.def("set_blocks", [](int64_t blocks) { host_blocks = blocks; });
  m.def("wrong_divisions", [](uintptr_t a, uintptr_t b, int64_t n, int ulps) {
    const float *x = reinterpret_cast<const float*>(a), *y = reinterpret_cast<const float*>(b);
    return wrong_divisions({x, x + n}, {y, y + n}, ulps);
  });
  m.def("wrong_reciprocals", [](uintptr_t b, int64_t n, int ulps) {
    const float* x = reinterpret_cast<const float*>(b);
    return wrong_reciprocals({x, x + n}, ulps);
  });
}

}  // namespace cuda
}  // namespace lowp
