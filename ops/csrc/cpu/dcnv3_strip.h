// Sampling points of deformable convolution v3's forward, a strip of cells and one group at a time.
#pragma once

#include <initializer_list>

#include "../common/dcnv3.h"
#include "kernels.h"
#include "memory.h"
#include "vectors.h"

namespace bevperception::cpu {
namespace {

// Where points lie on an axis of a plane: between a cell and the next, and how far from the cell.
template <class F, class I>
struct AxisPlace {
  I cell;
  F fraction;
};

// position: from the map's first cell, whose place is 1. What is beyond the border or NaN comes to lie on the border.
template <int N, class T>
BEV_INLINE AxisPlace<Vector<T, N>, Vector<int32_t, N>> place_on_plane(const Vector<T, N>& position, T size) {
  using F = Vector<T, N>;
  const F zero = broadcast<N>(T(0)), one = broadcast<N>(T(1)), last = broadcast<N>(size);
  const F place = position + one;
  const F above = place > zero ? place : zero;
  const F within = above < last + one ? above : last + one;
  const auto cell = convert<Vector<int32_t, N>>(within < last ? within : last);
  return {cell, within - convert<F>(cell)};
}

// Points of consecutive cells, cell by cell.
template <class T>
struct StripPoints {
  const int32_t* __restrict corner;      // where the corner (0, 0) lies in its plane
  const T* __restrict weights[4];        // of the corners (0, 0), (0, 1), (1, 0) and (1, 1)
  int64_t first_row, last_row;           // of the plane that they look at
};

// Finds the points of consecutive cells of an output row. Every kind of number stands in a row of its own.
template <class T>
class Strip {
 public:
  // cells: at most.
  Strip(const Dcnv3<T>& problem, int64_t cells)
      : problem_(problem),
        points_(problem.sizes.points()),
        capacity_((cells * points_ + kN - 1) / kN * kN),
        memory_(bytes()) {
    T* next = static_cast<T*>(memory_.data());
    __builtin_memset(next, 0, static_cast<size_t>(bytes()));  // also what lies behind the last point of a call
    for (T** row : {&tap_x_, &tap_y_, &cell_x_, &mask_, &weights_[0], &weights_[1], &weights_[2], &weights_[3]}) {
      *row = next;
      next += capacity_;
    }
    offset_ = next;
    corner_ = reinterpret_cast<int32_t*>(next + 2 * capacity_);
    for (int64_t i = 0, cell = 0; i < capacity_; ++cell) {
      for (int32_t point = 0; point < points_ && i < capacity_; ++point, ++i) {
        const Tap tap = kernel_tap(problem.sizes, point);
        tap_x_[i] = static_cast<T>(tap.x);
        tap_y_[i] = static_cast<T>(tap.y);
        cell_x_[i] = static_cast<T>(cell * problem.sizes.stride);
      }
    }
  }

  // Those of `cells` cells from (y, x) of an image's output on, until the next call.
  template <int POINTS>
  StripPoints<T> find(int64_t image, int64_t y, int64_t x, int64_t group, int64_t cells) {
    const Dcnv3Sizes& sizes = problem_.sizes;
    collect<POINTS>((image * sizes.out_height + y) * sizes.out_width + x, group, cells);
    const T centre_y = static_cast<T>(kernel_centre(sizes, y)), centre_x = static_cast<T>(kernel_centre(sizes, x));
    const Pair<int64_t> rows = place(centre_y, centre_x, cells * points_);
    return {corner_, {weights_[0], weights_[1], weights_[2], weights_[3]}, rows.first, rows.second};
  }

 private:
  static constexpr int kN = kWidth<T>;

  int64_t bytes() const { return capacity_ * static_cast<int64_t>(10 * sizeof(T) + sizeof(int32_t)); }

  // Offsets and masks, between which those of the other groups lie, one cell's behind the other's.
  template <int POINTS>
  BEV_INLINE void collect(int64_t cell, int64_t group, int64_t cells) {
    const int64_t points = POINTS > 0 ? POINTS : points_;
    const int64_t step = problem_.sizes.groups * points;
    const T* mask = problem_.mask + cell * step + group * points;
    const T* offset = problem_.offset + 2 * (cell * step + group * points);
    for (int64_t i = 0; i < cells; ++i) {
      __builtin_memcpy(offset_ + 2 * i * points, offset + 2 * i * step, static_cast<size_t>(2 * points) * sizeof(T));
      __builtin_memcpy(mask_ + i * points, mask + i * step, static_cast<size_t>(points) * sizeof(T));
    }
  }

  BEV_INLINE Pair<int64_t> place(T centre_y, T centre_x, int64_t count) {
    using F = Vector<T, kN>;
    using I = Vector<int32_t, kN>;
    const Dcnv3Sizes& sizes = problem_.sizes;
    const F scale = broadcast<kN>(problem_.offset_scale), row_y = broadcast<kN>(centre_y);
    const I row_step = broadcast<kN>(static_cast<int32_t>(sizes.width + 2));
    I first = broadcast<kN>(static_cast<int32_t>(sizes.height)), last = {};
    for (int64_t i = 0; i < count; i += kN) {
      const auto moved = load_pairs<kN>(offset_ + 2 * i);
      const F cell_x = centre_x + load<kN>(cell_x_ + i);
      const auto x = place_on_plane<kN, T>(tap_position(cell_x, load<kN>(tap_x_ + i), moved.first, scale),
                                           static_cast<T>(sizes.width));
      const auto y = place_on_plane<kN, T>(tap_position(row_y, load<kN>(tap_y_ + i), moved.second, scale),
                                           static_cast<T>(sizes.height));
      first = y.cell < first ? y.cell : first;
      last = y.cell > last ? y.cell : last;
      store<kN>(corner_ + i, y.cell * row_step + x.cell);
      const F mask = load<kN>(mask_ + i), high = mask * y.fraction, low = mask - high;
      const F low_right = low * x.fraction, high_right = high * x.fraction;
      store<kN>(weights_[0] + i, low - low_right);
      store<kN>(weights_[1] + i, low_right);
      store<kN>(weights_[2] + i, high - high_right);
      store<kN>(weights_[3] + i, high_right);
    }
    int32_t lowest = first[0], highest = last[0];
    for (int k = 1; k < kN; ++k) {
      lowest = first[k] < lowest ? first[k] : lowest;
      highest = last[k] > highest ? last[k] : highest;
    }
    return {lowest, highest + 1};
  }

  const Dcnv3<T>& problem_;
  int64_t points_;    // of a cell
  int64_t capacity_;  // points, in whole vectors
  AlignedMemory memory_;
  T *tap_x_, *tap_y_, *cell_x_, *mask_, *offset_;
  T* weights_[4];
  int32_t* corner_;
};

}  // namespace
}  // namespace bevperception::cpu
