// The CUDA kernels on the emulator, in one library with their binding (csrc/cuda/binding.cpp).
#include "../csrc/cuda/dcnv3.cu"
#include "../csrc/cuda/deform_attn.cu"
#include "../csrc/cuda/ms_deform_attn.cu"

// 0: threads take turns as they are counted; 1: backwards; 2: shuffled.
extern "C" __attribute__((visibility("default"))) void bev_emulator_set_order(int order) {
  bevperception::emulator::order() = static_cast<bevperception::emulator::Order>(order);
}
