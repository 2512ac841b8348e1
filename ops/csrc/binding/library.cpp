// Operators that speak about the library itself.
#include "tensors.h"

#include <string>

namespace bevperception {
namespace {

std::string cpu_isa() { return cpu::current_isa().name; }

std::string available_cpu_isas() {
  std::string names;
  for (int k = 0; cpu::available_isa(k) != nullptr; ++k) {
    if (k > 0) names += ' ';
    names += cpu::available_isa(k);
  }
  return names;
}

void select_cpu_isa(std::string name) {
  STD_TORCH_CHECK(cpu::select_isa(name.empty() ? nullptr : name.c_str()), "this CPU or build has no instruction set '",
                  name, "'; it has: ", available_cpu_isas());
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def("cpu_isa() -> str");
  m.def("available_cpu_isas() -> str");
  m.def("select_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&bevperception::cpu_isa));
  m.impl("available_cpu_isas", TORCH_BOX(&bevperception::available_cpu_isas));
  m.impl("select_cpu_isa", TORCH_BOX(&bevperception::select_cpu_isa));
}
