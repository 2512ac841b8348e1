// The input of deformable convolution v3 as its forward reads it: in planes, one a group, in which the cells that
// neighbouring outputs look at lie close together. In the input, all other groups lie between two cells of a group,
// and what an output and its neighbours look at exceeds the first-level cache. Around each plane runs a border of
// zeros, which stands in for every test whether a corner is inside the map.
#pragma once

#include "../common/dcnv3.h"
#include "kernels.h"
#include "memory.h"
#include "vectors.h"

namespace bevperception::cpu {
namespace {

// Some groups' planes of one image, filled row by row as far as points reach. Rows and columns count from the border:
// cell (y, x) of the map is (y + 1, x + 1) of its plane.
template <class T>
class GroupPlanes {
 public:
  // memory: numbers(problem.sizes) for each group.
  GroupPlanes(const Dcnv3<T>& problem, int64_t image, int64_t first_group, int64_t groups, T* memory)
      : sizes_(problem.sizes),
        cell_stride_(sizes_.groups * sizes_.channels),
        map_(problem.input + image * sizes_.height * sizes_.width * cell_stride_ + first_group * sizes_.channels),
        groups_(groups),
        memory_(memory) {}

  static int64_t row_step(const Dcnv3Sizes& sizes) { return (sizes.width + 2) * sizes.channels; }
  static int64_t numbers(const Dcnv3Sizes& sizes) { return (sizes.height + 2) * row_step(sizes); }
  // group: from 0 for the first there is.
  const T* plane(int64_t group) const { return memory_ + group * numbers(sizes_); }

  // Fills the rows from low to high, and those between them and what there is.
  template <int CHANNELS>
  void fill(int64_t low, int64_t high) {
    if (begin_ == end_) begin_ = end_ = low;
    while (begin_ > low) fill_row<CHANNELS>(--begin_);
    while (end_ <= high) fill_row<CHANNELS>(end_++);
  }

 private:
  template <int CHANNELS>
  void fill_row(int64_t row) {
    const int64_t channels = CHANNELS > 0 ? CHANNELS : sizes_.channels;
    const size_t bytes = static_cast<size_t>(channels) * sizeof(T);
    const int64_t width = row_step(sizes_), step = numbers(sizes_);
    const bool is_border = row == 0 || row > sizes_.height;
    T* to = memory_ + row * width;
    for (int64_t group = 0; group < groups_; ++group) {
      T* begin = to + group * step;
      __builtin_memset(begin, 0, is_border ? static_cast<size_t>(width) * sizeof(T) : bytes);
      __builtin_memset(begin + width - channels, 0, bytes);
    }
    if (is_border) return;
    const T* from = map_ + (row - 1) * sizes_.width * cell_stride_;
    for (int64_t x = 0; x < sizes_.width; ++x, from += cell_stride_) {
      to += channels;
      for (int64_t group = 0; group < groups_; ++group) {
        __builtin_memcpy(to + group * step, from + group * channels, bytes);
      }
    }
  }

  const Dcnv3Sizes& sizes_;
  int64_t cell_stride_;
  const T* map_;  // cell (0, 0), first channel of the first group
  int64_t groups_;
  T* memory_;
  int64_t begin_ = 0, end_ = 0;  // rows there are
};

}  // namespace
}  // namespace bevperception::cpu
