#include "cuda/products.h"

#include <stdexcept>

#include "cuda/launch.h"

namespace lowp {
namespace cuda {
namespace {

bool has_wgmma([[maybe_unused]] const char* op, [[maybe_unused]] const Place& place) {
#ifdef LOWP_SM90A
  const Capability c = capability(op, place.device);
  return c.major == 9 && c.minor == 0;
#else
  return false;
#endif
}

}  // namespace

#ifndef LOWP_SM90A
bool wgmma_bf16(const Place&, const ProductArgs&, float*) { return false; }
bool wgmma_fp16(const Place&, const ProductArgs&, float*) { return false; }
bool wgmma_scaled_mm(const Place&, const ScaledMmArgs&) { return false; }
#endif

bool product(const Place& place, const ProductArgs& p, float* row_sums) {
  if (p.a.type == Float::fp32 || p.b.type != p.a.type) {
    throw std::invalid_argument("lowp::linear: the CUDA product takes bf16 or fp16 matrices");
  }
  if (p.M == 0 || p.N == 0) return false;
  const bool summed = row_sums != nullptr && can_sum_rows(p);
  float* sums = summed ? row_sums : nullptr;
  const bool launched =
      has_wgmma("linear", place) &&
      (p.a.type == Float::bf16 ? wgmma_bf16(place, p, sums) : wgmma_fp16(place, p, sums));
  if (!launched) mma_product(place, p, sums);
  return summed;
}

void scaled_mm(const Place& place, const ScaledMmArgs& p) {
  if (p.a_k_stride != 1 || p.b_k_stride != 1) {
    throw std::invalid_argument("lowp::scaled_mm: the CUDA product takes codes adjacent along K");
  }
  if (p.M == 0 || p.N == 0) return;
  if (has_wgmma("scaled_mm", place) && wgmma_scaled_mm(place, p)) return;
  mma_scaled_mm(place, p);
}

}  // namespace cuda
}  // namespace lowp
