// The kernels compiled for what every CPU of the architecture has; setup.py holds the flags.
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kBaseline = isa_named("baseline");
}  // namespace bevperception::cpu
