// The kernels compiled for AVX-512; setup.py holds the flags.
#if defined(__x86_64__)
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kAvx512 = isa_named("avx512");
}  // namespace bevperception::cpu
#endif
