// Memory for a large output before its first write. Included inside every instruction set's
// translation unit.
//
// glibc takes blocks of 32 MB and more afresh from the system every time, and first writes to their
// 4 KB pages cost several times the work. So huge pages are asked for, as NumPy does for its
// arrays, and every thread has its share mapped at once. Where a system refuses, all is as it was.
#pragma once
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lowp {
namespace LOWP_ISA {

constexpr int64_t kAround = 1 << 24;  // bytes of an output that few caches keep until it is read

class FreshPages {
 public:
  FreshPages(void* p, int64_t bytes)
      : p_(reinterpret_cast<uintptr_t>(p)), is_fresh_(bytes >= int64_t{32} << 20) {
#ifdef MADV_HUGEPAGE
    advise(0, bytes, MADV_HUGEPAGE);
#endif
  }

  // Bytes begin .. end-1, by the thread that writes them.
  void map([[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) const {
#ifdef MADV_POPULATE_WRITE
    advise(begin, end, MADV_POPULATE_WRITE);
#endif
  }

 private:
  [[maybe_unused]] void advise(int64_t begin, int64_t end, int advice) const {
#ifdef __linux__
    constexpr uintptr_t kPage = 4096;
    if (!is_fresh_) return;
    const uintptr_t first = (p_ + begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (p_ + end) / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
#endif
  }

  uintptr_t p_;
  bool is_fresh_;
};

}  // namespace LOWP_ISA
}  // namespace lowp
