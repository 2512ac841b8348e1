// The kernels compiled for AVX-512; setup.py holds the flags.
#if defined(__x86_64__)
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kAvx512 = {"avx512", kernels_of_this_isa<float>(), kernels_of_this_isa<double>(),
                     layer_norm<Bfloat16, float>, winograd_of_this_isa()};
}  // namespace bevperception::cpu
#endif
