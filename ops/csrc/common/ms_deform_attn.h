// Multi-scale deformable attention: sizes and the arithmetic of one sampling point.
#pragma once

#include "bilinear.h"

namespace bevperception {

// Where a feature level lies in the value tensor.
struct Level {
  int32_t height, width;  // cells
  int32_t start;          // cells of the levels before it
};

struct MsDeformAttnSizes {
  int64_t batch, cells, heads, channels, queries, levels, points;
};

// A location in 0..1 over the map's edges, as a position in cells with centres on integers. T: the
// number type that F is or holds.
template <class T, class F>
BEV_HD F location_to_position(F location, F size) {
  return location * size - T(0.5);
}

}  // namespace bevperception
