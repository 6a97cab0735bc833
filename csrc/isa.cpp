// Which instruction set the kernels run with: CPUID decides, LOWP_CPU_ISA and set_isa() can lower it.
#include <cpuid.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernel.h"

namespace lowp {

bool g_forked_child = false;

namespace {

struct AtFork {
  AtFork() {
    pthread_atfork(nullptr, nullptr, [] { g_forked_child = true; });
  }
} at_fork;

// AMX lives in CPUID leaf 7: EDX bit 22 (bf16), 24 (tile), 25 (int8). GCC 10 has no builtin for it.
bool cpuid7_edx(int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && ((d >> bit) & 1u);
}

// The kernel lends a process the 8 KB of tile registers only when asked.
bool amx_granted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), XSAVE component
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{[] {
    const char* wanted = getenv("LOWP_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return cpu::best_isa();
    const Isa isa = isa_from_name(wanted);
    if (isa > cpu::best_isa()) {
      throw std::invalid_argument(std::string("LOWP_CPU_ISA=") + wanted +
                                  ": this CPU only supports up to " + isa_name(cpu::best_isa()));
    }
    return isa;
  }()};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(
      "instruction set: expected baseline, avx2, avx512, avx512_bf16 or amx, got '" + name + "'");
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
  __builtin_cpu_init();
#define LOWP_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  LOWP_FEATURE("sse4.2")
  LOWP_FEATURE("avx")
  LOWP_FEATURE("avx2")
  LOWP_FEATURE("fma")
  LOWP_FEATURE("avx512f")
  LOWP_FEATURE("avx512bw")
  LOWP_FEATURE("avx512dq")
  LOWP_FEATURE("avx512vl")
  LOWP_FEATURE("avx512vnni")
  LOWP_FEATURE("avx512bf16")
#undef LOWP_FEATURE
  if (cpuid7_edx(24) && cpuid7_edx(25)) found.push_back("amx-int8");
  if (cpuid7_edx(24) && cpuid7_edx(22)) found.push_back("amx-bf16");
  return found;
}

namespace cpu {

Isa best_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool amx =
      bf16 && cpuid7_edx(22) && cpuid7_edx(24) && cpuid7_edx(25) && amx_granted();
  if (amx) return Isa::amx;
  if (bf16) return Isa::avx512_bf16;
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("set_isa: this CPU only supports up to ") +
                                isa_name(best_isa()) + ", got " + isa_name(isa));
  }
  current().store(isa, std::memory_order_relaxed);
}

}  // namespace cpu
}  // namespace lowp
