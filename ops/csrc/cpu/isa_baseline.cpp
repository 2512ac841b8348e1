// The kernels compiled for what every CPU of the architecture has; setup.py holds the flags.
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kBaseline = {"baseline", kernels_of_this_isa<float>(), kernels_of_this_isa<double>(),
                       layer_norm<Bfloat16, float>, winograd_of_this_isa()};
}  // namespace bevperception::cpu
