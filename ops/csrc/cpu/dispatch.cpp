// Chooses the instruction set at run time.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace bevperception::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
#endif

struct Candidate {
  const Isa* isa;
  bool (*supported)();
};

const Candidate kCandidates[] = {
#if defined(__x86_64__)
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
