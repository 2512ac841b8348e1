// Deformable attention from raw predictions, over the maps of compressed rows, on GPUs.
#include "attention.cuh"
#include "launch.cuh"

#define BEV_TEXT_OF(x) #x
#define BEV_TEXT(x) BEV_TEXT_OF(x)

namespace bevperception::cuda {

const char* deform_attn(const DeformAttn& problem, void* output, void* stream) {
  return with_number(problem.number,
                     [&](auto zero) { return forward(DeformAttnOp<decltype(zero)>(problem), output, stream); });
}

const char* deform_attn_backward(const DeformAttn& problem, const void* output_gradient, void* value_gradient,
                                 void* offsets_gradient, void* logits_gradient, void* references_gradient,
                                 void* stream) {
  return with_number(problem.number, [&](auto zero) {
    const DeformAttnOp<decltype(zero)> op(problem, offsets_gradient, logits_gradient, references_gradient);
    return backward<true>(op, output_gradient, value_gradient, stream);
  });
}

const char* architectures() {
#if defined(BEV_CUDA_ARCHS)
  return BEV_TEXT(BEV_CUDA_ARCHS);
#else
  return "emulated";
#endif
}

}  // namespace bevperception::cuda
