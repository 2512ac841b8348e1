// Multi-scale deformable attention: first phase and loops over queries.
#pragma once

#include "kernels.h"
#include "sampling.h"

namespace bevperception::cpu {
namespace {

// A map larger than this is prefetched; on smaller ones prefetching costs more than it brings.
constexpr int64_t kPrefetchBytes = 4 << 20;

// The level of each point of a row's head range, one array a quantity.
template <class T>
class PointLevels {
 public:
  PointLevels(const MsDeformAttn<T>& problem, int64_t heads)
      : count(heads * problem.sizes.levels * problem.sizes.points),
        memory_(count * static_cast<int64_t>(2 * sizeof(T) + 3 * sizeof(int32_t))) {
    width = static_cast<T*>(memory_.data());
    height = width + count;
    columns = reinterpret_cast<int32_t*>(height + count);
    rows = columns + count;
    start = rows + count;
    for (int64_t i = 0; i < count; ++i) {
      const Level& level = problem.levels[i / problem.sizes.points % problem.sizes.levels];
      width[i] = static_cast<T>(level.width);
      height[i] = static_cast<T>(level.height);
      columns[i] = level.width;
      rows[i] = level.height;
      start[i] = level.start;
    }
  }

  const int64_t count;
  T *width, *height;
  int32_t *columns, *rows, *start;

 private:
  AlignedMemory memory_;
};

template <class T>
BEV_INLINE AxisSample<T> sample_x(const PointLevels<T>& levels, const T* locations, int64_t i) {
  return sample_axis(location_to_position(locations[2 * i], levels.width[i]), levels.columns[i]);
}

template <class T>
BEV_INLINE AxisSample<T> sample_y(const PointLevels<T>& levels, const T* locations, int64_t i) {
  return sample_axis(location_to_position(locations[2 * i + 1], levels.height[i]), levels.rows[i]);
}

// Corners of one row's head range, at `first` of the scratch.
template <class T>
BEV_INLINE void find_corners(const PointLevels<T>& levels, const T* __restrict locations,
                             const T* __restrict weights, const Corners<T>& corners, int64_t first) {
#pragma GCC ivdep
  for (int64_t i = 0; i < levels.count; ++i) {
    const AxisSample<T> x = sample_x(levels, locations, i), y = sample_y(levels, locations, i);
    write_corner_weights(corners, first + i, x, y, weights[i]);
    write_corner_cells(corners, first + i, x, y, levels.columns[i], levels.start[i]);
  }
}

// Gradients of one row's head range from the products of dot_rows.
template <class T>
BEV_INLINE void finish_point_gradients(const PointLevels<T>& levels, const T* __restrict locations,
                                       const T* __restrict weights, const T* __restrict dots,
                                       T* __restrict locations_gradient, T* __restrict weights_gradient) {
#pragma GCC ivdep
  for (int64_t i = 0; i < levels.count; ++i) {
    const AxisSample<T> x = sample_x(levels, locations, i), y = sample_y(levels, locations, i);
    const PointGradient<T> gradient = point_gradient(x, y, weights[i], dots[4 * i], dots[4 * i + 1],
                                                     dots[4 * i + 2], dots[4 * i + 3]);
    weights_gradient[i] = gradient.weight;
    locations_gradient[2 * i] = gradient.x * levels.width[i];
    locations_gradient[2 * i + 1] = gradient.y * levels.height[i];
  }
}

template <class T>
BEV_INLINE HeadRange head_range(const MsDeformAttnSizes& sizes, int64_t begin, int64_t end) {
  const int64_t map_bytes = sizes.cells * sizes.heads * sizes.channels * static_cast<int64_t>(sizeof(T));
  return {sizes.heads, sizes.channels, begin, end, sizes.levels * sizes.points, map_bytes > kPrefetchBytes};
}

// Calls visit(first row, rows) for chunks of rows (batch element, query) within one batch element.
template <class Visit>
BEV_INLINE void for_row_chunks(int64_t begin, int64_t end, int64_t queries, int64_t chunk, const Visit& visit) {
  for (int64_t row = begin; row < end;) {
    const int64_t of_batch = (row / queries + 1) * queries;
    int64_t rows = end - row;
    if (rows > chunk) rows = chunk;
    if (rows > of_batch - row) rows = of_batch - row;
    visit(row, rows);
    row += rows;
  }
}

template <class T>
void ms_deform_attn(const MsDeformAttn<T>& problem, T* output, int64_t begin, int64_t end) {
  const MsDeformAttnSizes& sizes = problem.sizes;
  const HeadRange heads = head_range<T>(sizes, 0, sizes.heads);
  const PointLevels<T> levels(problem, sizes.heads);
  const int64_t chunk = rows_of_chunk(levels.count);
  const Scratch<T> scratch(chunk * levels.count);
  for_row_chunks(begin, end, sizes.queries, chunk, [&](int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (row + r) * levels.count;
      find_corners(levels, problem.locations + 2 * first, problem.weights + first, scratch.corners(),
                   r * levels.count);
    }
    const T* map = problem.value + row / sizes.queries * sizes.cells * heads.cell_stride();
    gather_rows(scratch.corners(), rows, heads, map, output + row * heads.cell_stride());
  });
}

template <class T>
void ms_deform_attn_point_gradients(const MsDeformAttn<T>& problem, const T* output_gradient,
                                    T* locations_gradient, T* weights_gradient, int64_t begin, int64_t end) {
  const MsDeformAttnSizes& sizes = problem.sizes;
  const HeadRange heads = head_range<T>(sizes, 0, sizes.heads);
  const PointLevels<T> levels(problem, sizes.heads);
  const int64_t chunk = rows_of_chunk(levels.count);
  const Scratch<T> scratch(chunk * levels.count);
  for_row_chunks(begin, end, sizes.queries, chunk, [&](int64_t row, int64_t rows) {
    const int64_t first = row * levels.count;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r * levels.count;
      find_corners(levels, problem.locations + 2 * i, problem.weights + i, scratch.corners(), r * levels.count);
    }
    const T* map = problem.value + row / sizes.queries * sizes.cells * heads.cell_stride();
    dot_rows(scratch.corners(), rows, heads, map, output_gradient + row * heads.cell_stride(), scratch.dots());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r * levels.count;
      finish_point_gradients(levels, problem.locations + 2 * i, problem.weights + i,
                             scratch.dots() + 4 * r * levels.count, locations_gradient + 2 * i,
                             weights_gradient + i);
    }
  });
}

template <class T>
void ms_deform_attn_value_gradient(const MsDeformAttn<T>& problem, const T* output_gradient,
                                   T* value_gradient, const MapShare& share) {
  const MsDeformAttnSizes& sizes = problem.sizes;
  const HeadRange heads = head_range<T>(sizes, share.head_begin, share.head_end);
  const PointLevels<T> levels(problem, heads.count());
  const int64_t chunk = rows_of_chunk(levels.count);
  const Scratch<T> scratch(chunk * levels.count);
  const int64_t begin = share.batch * sizes.queries;
  T* map_gradient = value_gradient + share.batch * sizes.cells * heads.cell_stride();
  for_row_chunks(begin, begin + sizes.queries, sizes.queries, chunk, [&](int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = ((row + r) * sizes.heads + heads.begin) * heads.points;
      find_corners(levels, problem.locations + 2 * first, problem.weights + first, scratch.corners(),
                   r * levels.count);
    }
    scatter_rows(scratch.corners(), rows, heads, output_gradient + row * heads.cell_stride(), map_gradient);
  });
}

}  // namespace
}  // namespace bevperception::cpu
