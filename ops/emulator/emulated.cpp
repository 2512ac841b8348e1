// The emulator's switch; it lies in one library with the CUDA kernels and their binding (csrc/cuda).
#include "emulator.h"

// 0: threads take turns as they are counted; 1: backwards; 2: shuffled.
extern "C" __attribute__((visibility("default"))) void bev_emulator_set_order(int order) {
  bevperception::emulator::order() = static_cast<bevperception::emulator::Order>(order);
}
