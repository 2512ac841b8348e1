// Arguments of ms_deform_attn, checked; for the CPU and for CUDA.
#pragma once

#include "levels.h"

namespace bevperception {

struct MsDeformAttnArguments {
  Tensor value, locations, weights;  // contiguous
  std::vector<Level> levels;
  MsDeformAttnSizes sizes;

  // Whether nothing is sampled: then the result and all gradients are zero.
  bool samples_nothing() const {
    return value.numel() == 0 || sizes.queries == 0 || sizes.points == 0;
  }

  static MsDeformAttnArguments of(const char* op, const Tensor& value, const std::vector<int64_t>& shapes,
                                  const Tensor& locations, const Tensor& weights) {
    STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6, op, ": value must have 4 dimensions, ",
                    "sampling_locations 6");
    MsDeformAttnArguments arguments{torch::stable::contiguous(value), torch::stable::contiguous(locations),
                                    torch::stable::contiguous(weights), levels_of(op, shapes), {}};
    const int64_t cells = cells_of(arguments.levels);
    MsDeformAttnSizes& sizes = arguments.sizes;
    sizes = {value.size(0),     cells,
             value.size(2),     value.size(3),
             locations.size(1), static_cast<int64_t>(arguments.levels.size()),
             locations.size(4)};
    require_shape(op, "value", value, {sizes.batch, cells, sizes.heads, sizes.channels});
    require_shape(op, "sampling_locations", locations,
                  {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
    require_shape(op, "attention_weights", weights,
                  {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points});
    return arguments;
  }
};

}  // namespace bevperception
