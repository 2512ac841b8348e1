// Deformable convolution v3: sizes and the arithmetic of one sampling point.
#pragma once

#include "bilinear.h"

namespace bevperception {

struct Dcnv3Sizes {
  int64_t batch, height, width, groups, channels;  // channels: of one group
  int64_t out_height, out_width;
  int32_t kernel_size, stride, padding, dilation;
  bool remove_center;

  BEV_HD int32_t points() const { return kernel_size * kernel_size - (remove_center ? 1 : 0); }
};

// Cells from the kernel's first row or column to its centre.
BEV_HD int32_t kernel_reach(const Dcnv3Sizes& sizes) {
  return sizes.dilation * (sizes.kernel_size - 1) / 2;
}

// Input coordinate of the kernel's centre for an output row or column.
BEV_HD int64_t kernel_centre(const Dcnv3Sizes& sizes, int64_t output_index) {
  return output_index * sizes.stride - sizes.padding + kernel_reach(sizes);
}

struct Tap {
  int32_t x, y;  // cells from the kernel's centre, before offset_scale
};

// Points run over the kernel's columns in the outer loop, its rows in the inner.
BEV_HD Tap kernel_tap(const Dcnv3Sizes& sizes, int32_t point) {
  const int32_t centre = sizes.kernel_size * sizes.kernel_size / 2;
  const int32_t index = point + (sizes.remove_center && point >= centre ? 1 : 0);
  Tap tap;
  tap.x = index / sizes.kernel_size * sizes.dilation - kernel_reach(sizes);
  tap.y = index % sizes.kernel_size * sizes.dilation - kernel_reach(sizes);
  return tap;
}

// Position of a point on one axis, in input cells.
template <class F>
BEV_HD F tap_position(F centre, F tap, F offset, F offset_scale) {
  return centre + (tap + offset) * offset_scale;
}

}  // namespace bevperception
