// The kernels compiled for AVX2 with FMA; setup.py holds the flags.
#if defined(__x86_64__)
#include "isa_table.h"

namespace bevperception::cpu {
const Isa kAvx2 = isa_named("avx2");
}  // namespace bevperception::cpu
#endif
