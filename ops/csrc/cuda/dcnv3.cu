// Deformable convolution v3 on GPUs.
#include "dcnv3.cuh"
#include "launch.cuh"

namespace bevperception::cuda {

const char* dcnv3(const Dcnv3& problem, void* output, void* stream) {
  return with_number(problem.number,
                     [&](auto zero) { return forward(Dcnv3Op<decltype(zero)>(problem), output, stream); });
}

const char* dcnv3_backward(const Dcnv3& problem, const void* output_gradient, const MapGradient& input_gradient,
                           void* offset_gradient, void* mask_gradient, void* stream) {
  return with_number(problem.number, [&](auto zero) {
    const Dcnv3Op<decltype(zero)> op(problem, offset_gradient, mask_gradient);
    return backward_of_maps(op, output_gradient, input_gradient, stream);
  });
}

}  // namespace bevperception::cuda
