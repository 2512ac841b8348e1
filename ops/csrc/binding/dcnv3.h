// Arguments of dcnv3, checked; for the CPU and for CUDA.
#pragma once

#include <limits>

#include "tensors.h"

namespace bevperception {

// The settings in the order of the schema.
struct Dcnv3Settings {
  int64_t kernel_size, stride, padding, dilation, groups;
  double offset_scale;
  bool remove_center;

  // Cells of the output along an axis.
  int64_t output_size(int64_t size) const {
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) / stride + 1;
  }
};

struct Dcnv3Arguments {
  Tensor input, offset, mask;  // contiguous
  Dcnv3Sizes sizes;
  double offset_scale;

  // Whether nothing is sampled: then the result and all gradients are zero.
  bool samples_nothing() const { return input.numel() == 0 || mask.numel() == 0; }

  static Dcnv3Arguments of(const char* op, const Tensor& input, const Tensor& offset, const Tensor& mask,
                           const Dcnv3Settings& settings) {
    STD_TORCH_CHECK(input.dim() == 4, op, ": input must have 4 dimensions");
    const int64_t smallest = std::min({settings.kernel_size, settings.stride, settings.dilation, settings.groups});
    // So small that no product of them, nor of one with a size, leaves its type.
    STD_TORCH_CHECK(settings.kernel_size < 1 << 10 && settings.groups <= std::max<int64_t>(1, input.size(3)) &&
                        std::max({settings.stride, settings.padding, settings.dilation}) < 1 << 20,
                    op, ": settings are too large");
    STD_TORCH_CHECK(smallest > 0 && settings.padding >= 0 && input.size(3) % settings.groups == 0 &&
                        input.size(1) > 0 && input.size(2) > 0,
                    op, ": settings do not fit the input");
    STD_TORCH_CHECK((input.size(1) + 2) * (input.size(2) + 2) <= std::numeric_limits<int32_t>::max(), op,
                    ": more than 2^31 - 1 cells, with a border around them");
    const Dcnv3Sizes sizes = {input.size(0),
                              input.size(1),
                              input.size(2),
                              settings.groups,
                              input.size(3) / settings.groups,
                              settings.output_size(input.size(1)),
                              settings.output_size(input.size(2)),
                              static_cast<int32_t>(settings.kernel_size),
                              static_cast<int32_t>(settings.stride),
                              static_cast<int32_t>(settings.padding),
                              static_cast<int32_t>(settings.dilation),
                              settings.remove_center};
    const int64_t points = sizes.groups * sizes.points();
    require_shape(op, "offset", offset, {sizes.batch, sizes.out_height, sizes.out_width, 2 * points});
    require_shape(op, "mask", mask, {sizes.batch, sizes.out_height, sizes.out_width, points});
    return {torch::stable::contiguous(input), torch::stable::contiguous(offset), torch::stable::contiguous(mask),
            sizes, settings.offset_scale};
  }
};

}  // namespace bevperception
