// Bilinear sampling with zeros outside the map: one axis, one point, its gradients.
#pragma once

#include "host_device.h"

namespace bevperception {

// The two cells of an axis that a position lies between. A cell outside the map keeps a clamped
// index, which is always safe to read, and weight 0.
template <class T>
struct AxisSample {
  int32_t low, high;         // clamped indices
  T low_weight, high_weight;  // 0 where the cell is outside
  T low_inside, high_inside;  // 1 or 0
};

// position: in cells, centres on integers. Anything not in (-1, size), NaN included, samples zero.
template <class T>
BEV_HD AxisSample<T> sample_axis(T position, int32_t size) {
  const bool inside = position > T(-1) && position < T(size);
  const T safe = inside ? position : T(-1);  // cell -1: outside; its neighbour has weight 0
  const T below = floor_of(safe);
  const T fraction = safe - below;
  const int32_t low = static_cast<int32_t>(below);
  const int32_t high = low + 1;
  AxisSample<T> sample;
  sample.low_inside = low >= 0 ? T(1) : T(0);
  sample.high_inside = inside && high < size ? T(1) : T(0);
  sample.low_weight = low >= 0 ? T(1) - fraction : T(0);
  sample.high_weight = high < size ? fraction : T(0);
  sample.low = low > 0 ? low : 0;
  sample.high = high < size ? high : size - 1;
  return sample;
}

// True if at least one of the point's four cells may lie inside the map.
template <class T>
BEV_HD bool touches_map(const AxisSample<T>& x, const AxisSample<T>& y) {
  return (x.low_inside + x.high_inside) * (y.low_inside + y.high_inside) > T(0);
}

template <class T>
struct PointGradient {
  T weight;  // by the point's own weight
  T x, y;    // by its position in cells
};

// dot_yx: sum over channels of the output's gradient times the value of the cell (y, x), where y and
// x are 0 for the low and 1 for the high cell; those outside the map may hold any finite number.
template <class T>
BEV_HD PointGradient<T> point_gradient(const AxisSample<T>& x, const AxisSample<T>& y, T weight,
                                       T dot_00, T dot_01, T dot_10, T dot_11) {
  const T row_low = x.low_weight * dot_00 + x.high_weight * dot_01;
  const T row_high = x.low_weight * dot_10 + x.high_weight * dot_11;
  const T slope_low = x.high_inside * dot_01 - x.low_inside * dot_00;
  const T slope_high = x.high_inside * dot_11 - x.low_inside * dot_10;
  PointGradient<T> gradient;
  gradient.weight = y.low_weight * row_low + y.high_weight * row_high;
  gradient.x = weight * (y.low_weight * slope_low + y.high_weight * slope_high);
  gradient.y = weight * (y.high_inside * row_high - y.low_inside * row_low);
  return gradient;
}

}  // namespace bevperception
