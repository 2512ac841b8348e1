// The kernels compiled for AVX2 with FMA; setup.py holds the flags.
#if defined(__x86_64__)
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kAvx2 = {"avx2", kernels_of_this_isa<float>(), kernels_of_this_isa<double>(),
                   layer_norm<Bfloat16, float>, winograd_of_this_isa()};
}  // namespace bevperception::cpu
#endif
