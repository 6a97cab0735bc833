#include <string.h>

#include "cuda/groups.h"

namespace lowp {
namespace cuda {
namespace {

constexpr int kWords = 480;  // of 8 bytes: the 4 KB of parameters that every driver takes, less 256

struct Write {
  struct Args {
    uint64_t words[kWords];
    uint64_t* target;
  };
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};
  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& a, int64_t i, int, Lane&) {
    a.target[i] = a.words[i];
  }
};

}  // namespace

void upload(const Place& place, const void* bytes, int64_t size, void* target) {
  Write::Args a;
  a.target = static_cast<uint64_t*>(target);
  for (int64_t at = 0; at < size; at += 8 * kWords, a.target += kWords) {
    const int64_t left = size - at < 8 * kWords ? size - at : 8 * kWords;
    memcpy(a.words, static_cast<const char*>(bytes) + at, static_cast<size_t>(left));
    launch_groups<Write>("upload", place, a, left / 8);
  }
}

}  // namespace cuda
}  // namespace lowp
