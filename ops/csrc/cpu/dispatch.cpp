// Chooses the instruction set at run time.
#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bevperception::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

// Whether the CPU has tiles of bfloat16 numbers, and Linux (5.16 or newer) lets this process use them.
bool has_amx() {
#if defined(BEV_EMULATED_TILES)  // for tests: isa_amx.cpp is compiled so that it needs none
  return has_avx512();
#elif defined(__linux__)
  constexpr unsigned kBfloat16Tiles = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBfloat16Tiles) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Isa* isa;
  bool (*supported)();
};

const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAmx, has_amx},
    {&kAvx512, has_avx512},
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&kBaseline, [] { return true; }},
};

const Isa* find_isa(const char* name) {
  for (const Candidate& candidate : kCandidates) {
    if (candidate.supported() && (name == nullptr || std::strcmp(name, candidate.isa->name) == 0)) {
      return candidate.isa;
    }
  }
  return nullptr;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{find_isa(nullptr)};
  return isa;
}

}  // namespace

const Isa& current_isa() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa != nullptr) selected().store(isa, std::memory_order_relaxed);
  return isa != nullptr;
}

const char* available_isa(int k) {
  for (const Candidate& candidate : kCandidates) {
    if (candidate.supported() && k-- == 0) return candidate.isa->name;
  }
  return nullptr;
}

}  // namespace bevperception::cpu
