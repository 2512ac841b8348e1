// Forward of deformable convolution v3.
#pragma once

#include "dcnv3_planes.h"
#include "dcnv3_strip.h"
#include "sampling.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kPlaneBytes = KeptMemory::kLimit;  // of the planes at a time; one if it is larger
constexpr int64_t kStripPoints = 288;  // of a group, in consecutive cells of a row

// One cell and group of the output: the weighted corners of its points.
template <class T, int POINTS, int CHANNELS>
struct GatherCell {
  const StripPoints<T>& points;
  int64_t first, count;  // points of the cell
  int64_t channels_at_run_time, row_step;
  const T* __restrict plane;
  T* __restrict output;

  static constexpr int sums(int vectors) { return vectors > 2 ? 2 : 4; }  // chains of additions, as registers allow

  template <int N, int COUNT>
  BEV_INLINE void add(int64_t p, int64_t c, Vector<T, N> (&sum)[sums(COUNT)][COUNT]) const {
    const int64_t channels = CHANNELS > 0 ? CHANNELS : channels_at_run_time;
    const T* cell = plane + points.corner[p] * channels + c;
    const T* const corners[4] = {cell, cell + channels, cell + row_step, cell + row_step + channels};
    for (int k = 0; k < 4; ++k) {
      const Vector<T, N> weight = broadcast<N>(points.weights[k][p]);
      for (int j = 0; j < COUNT; ++j) sum[k % sums(COUNT)][j] += weight * load<N>(corners[k] + j * N);
    }
  }

  template <int N, int COUNT>
  BEV_INLINE void run(int64_t c) const {
    Vector<T, N> sum[sums(COUNT)][COUNT] = {};
    if constexpr (POINTS > 0) {
#pragma GCC unroll 9
      for (int p = 0; p < POINTS; ++p) add<N, COUNT>(first + p, c, sum);
    } else {
      for (int64_t p = 0; p < count; ++p) add<N, COUNT>(first + p, c, sum);
    }
    for (int j = 0; j < COUNT; ++j) {
      Vector<T, N> total = sum[0][j] + sum[1][j];
      if constexpr (sums(COUNT) == 4) total += sum[2][j] + sum[3][j];
      store<N>(output + c + j * N, total);
    }
  }
};

// Output rows of one image. POINTS, CHANNELS: of a group, if they are known, else 0.
template <class T, int POINTS, int CHANNELS>
class Dcnv3Forward {
 public:
  Dcnv3Forward(const Dcnv3<T>& problem, T* output, int64_t image)
      : problem_(problem),
        sizes_(problem.sizes),
        output_(output),
        image_(image),
        points_(POINTS > 0 ? POINTS : sizes_.points()),
        channels_(CHANNELS > 0 ? CHANNELS : sizes_.channels),
        cells_(cells_of_strip(sizes_)),
        strip_(problem, cells_) {}

  void run(int64_t begin, int64_t end) {
    const int64_t bytes = GroupPlanes<T>::numbers(sizes_) * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = kPlaneBytes / bytes > 0 ? kPlaneBytes / bytes : 1;
    const int64_t groups = fitting < sizes_.groups ? fitting : sizes_.groups;
    const KeptMemory memory(groups * bytes);
    for (int64_t first = 0; first < sizes_.groups; first += groups) {
      const int64_t left = sizes_.groups - first, count = groups < left ? groups : left;
      GroupPlanes<T> planes(problem_, image_, first, count, static_cast<T*>(memory.data()));
      for (int64_t y = begin; y < end; ++y) {
        for (int64_t x = 0; x < sizes_.out_width; x += cells_) {
          const bool is_last = x + cells_ >= sizes_.out_width;
          Next next = is_last ? (y + 1 < end ? next_strip(y + 1, 0) : Next{}) : next_strip(y, x + cells_);
          run_strip(planes, first, count, y, x, next);
        }
      }
    }
  }

 private:
  // What the next strip of all groups reads and writes; a part of it is asked for with every cell of this one.
  struct Next {
    Ahead offsets, masks, output;
  };

  static int64_t cells_of_strip(const Dcnv3Sizes& sizes) {
    const int64_t most = kStripPoints / sizes.points() > 0 ? kStripPoints / sizes.points() : 1;
    const int64_t strips = (sizes.out_width + most - 1) / most;
    return (sizes.out_width + strips - 1) / strips;  // strips of one length
  }

  int64_t cells_from(int64_t x) const { return sizes_.out_width - x < cells_ ? sizes_.out_width - x : cells_; }
  int64_t cell_at(int64_t y, int64_t x) const { return (image_ * sizes_.out_height + y) * sizes_.out_width + x; }

  Next next_strip(int64_t y, int64_t x) const {
    const int64_t cell = cell_at(y, x) * sizes_.groups, cells = cells_from(x) * sizes_.groups;
    Next next;
    next.offsets = {problem_.offset + 2 * points_ * cell, problem_.offset + 2 * points_ * (cell + cells)};
    next.masks = {problem_.mask + points_ * cell, problem_.mask + points_ * (cell + cells)};
    next.output = {output_ + channels_ * cell, output_ + channels_ * (cell + cells)};
    return next;
  }

  // All groups, which share lines of offsets and masks.
  void run_strip(GroupPlanes<T>& planes, int64_t first_group, int64_t groups, int64_t y, int64_t x, Next& next) {
    const int64_t cells = cells_from(x);
    for (int64_t group = 0; group < groups; ++group) {
      const StripPoints<T> points = strip_.template find<POINTS>(image_, y, x, first_group + group, cells);
      planes.template fill<CHANNELS>(points.first_row, points.last_row);
      const int64_t first_channel = (cell_at(y, x) * sizes_.groups + first_group + group) * channels_;
      gather(points, cells, planes.plane(group), output_ + first_channel, next);
    }
  }

  void gather(const StripPoints<T>& points, int64_t cells, const T* plane, T* output, Next& next_of_strip) const {
    const int64_t count = POINTS > 0 ? POINTS : points_, channels = CHANNELS > 0 ? CHANNELS : channels_;
    const int64_t stride = sizes_.groups * channels, row_step = GroupPlanes<T>::row_step(sizes_);
    Next next = next_of_strip;  // here the compiler sees that storing to the output does not change it
    for (int64_t i = 0; i < cells; ++i) {
      next.offsets.ask(lines_of(2 * count));
      next.masks.ask(lines_of(count));
      next.output.ask(lines_of(channels));
      for_channel_blocks<T, CHANNELS>(
          channels,
          GatherCell<T, POINTS, CHANNELS>{points, i * count, count, channels, row_step, plane, output + i * stride});
    }
    next_of_strip = next;
  }

  static int64_t lines_of(int64_t numbers) { return (numbers * static_cast<int64_t>(sizeof(T)) + 63) / 64; }

  const Dcnv3<T>& problem_;
  const Dcnv3Sizes& sizes_;
  T* output_;
  int64_t image_, points_, channels_, cells_;
  Strip<T> strip_;
};

template <class T>
void dcnv3(const Dcnv3<T>& problem, T* output, int64_t image, int64_t begin, int64_t end) {
  if (problem.sizes.points() == 0) {
    const int64_t row = problem.sizes.out_width * problem.sizes.groups * problem.sizes.channels;
    T* first = output + (image * problem.sizes.out_height + begin) * row;
    __builtin_memset(first, 0, static_cast<size_t>((end - begin) * row) * sizeof(T));
    return;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.sizes.points() == 9 && problem.sizes.channels == 16) {
      return Dcnv3Forward<T, 9, 16>(problem, output, image).run(begin, end);
    }
  }
  Dcnv3Forward<T, 0, 0>(problem, output, image).run(begin, end);
}

}  // namespace
}  // namespace bevperception::cpu
