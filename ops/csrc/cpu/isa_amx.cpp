// What AVX-512 with AMX's tiles of bfloat16 numbers does better; setup.py holds the flags.
#if defined(__x86_64__)
#include "split_convolution.h"

namespace bevperception::cpu {
const SplitKernels kAmxKernels = {split_weights, split_block};
}  // namespace bevperception::cpu
#endif
