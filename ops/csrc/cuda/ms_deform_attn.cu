// Multi-scale deformable attention on GPUs.
#include "attention.cuh"
#include "launch.cuh"

namespace bevperception::cuda {

const char* ms_deform_attn(const MsDeformAttn& problem, void* output, void* stream) {
  return with_number(problem.number, [&](auto zero) {
    return forward(MsDeformAttnOp<decltype(zero)>(problem), output, stream);
  });
}

const char* ms_deform_attn_backward(const MsDeformAttn& problem, const void* output_gradient,
                                    const MapGradient& value_gradient, void* locations_gradient,
                                    void* weights_gradient, void* stream) {
  return with_number(problem.number, [&](auto zero) {
    const MsDeformAttnOp<decltype(zero)> op(problem, locations_gradient, weights_gradient);
    return backward_of_maps(op, output_gradient, value_gradient, stream);
  });
}

}  // namespace bevperception::cuda
