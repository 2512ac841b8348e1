// Bilinear sampling with zeros outside the map: one axis, one point, its gradients.
#pragma once

#include "host_device.h"

namespace bevperception {

// The two cells of an axis that a position lies between. A cell outside the map keeps a clamped
// index, which is always safe to read, and weight 0. F: numbers; I: 32-bit indices.
template <class F, class I>
struct AxisSample {
  I low, high;                // clamped indices
  F low_weight, high_weight;  // 0 where the cell is outside
  F low_inside, high_inside;  // 1 or 0
  I first;                    // the low index before clamping; -2: no cell of this axis is inside
};

// position: in cells, centres on integers. Anything not in (-1, cells), NaN included, samples zero.
// size: cells as F.
template <class F, class I>
BEV_HD AxisSample<F, I> sample_axis(F position, F size, I cells) {
  const F zero = constant<F, 0>(), one = constant<F, 1>();
  const auto near = (position > constant<F, -1>()) & (position < size);
  const F safe = near ? position : constant<F, -2>();
  const F cut = convert<F>(convert<I>(safe));
  const F below = cut > safe ? cut - one : cut;
  const F fraction = safe - below;
  AxisSample<F, I> sample;
  sample.low_inside = below >= zero ? one : zero;
  sample.high_inside = ((below >= constant<F, -1>()) & (below < size - one)) ? one : zero;
  sample.low_weight = below >= zero ? one - fraction : zero;
  sample.high_weight = below < size - one ? fraction : zero;
  const I first = convert<I>(below), second = first + 1, none = constant<I, 0>();
  sample.first = first;
  sample.low = first > none ? first : none;
  sample.high = second > none ? second : none;
  sample.high = sample.high < cells ? sample.high : cells - 1;
  return sample;
}

template <class F>
struct PointGradient {
  F weight;  // by the point's own weight
  F x, y;    // by its position in cells
};

// Gradients of one point. dot_yx: sum over channels of the output's gradient times the value of the
// cell (y, x), where y and x are 0 for the low and 1 for the high cell; for cells outside the map it
// may be any finite number.
template <class F, class I>
BEV_HD PointGradient<F> point_gradient(const AxisSample<F, I>& x, const AxisSample<F, I>& y, F weight,
                                       F dot_00, F dot_01, F dot_10, F dot_11) {
  const F row_low = x.low_weight * dot_00 + x.high_weight * dot_01;
  const F row_high = x.low_weight * dot_10 + x.high_weight * dot_11;
  const F slope_low = x.high_inside * dot_01 - x.low_inside * dot_00;
  const F slope_high = x.high_inside * dot_11 - x.low_inside * dot_10;
  PointGradient<F> gradient;
  gradient.weight = y.low_weight * row_low + y.high_weight * row_high;
  gradient.x = weight * (y.low_weight * slope_low + y.high_weight * slope_high);
  gradient.y = weight * (y.high_inside * row_high - y.low_inside * row_low);
  return gradient;
}

}  // namespace bevperception
