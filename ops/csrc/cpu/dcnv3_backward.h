// Backward of deformable convolution v3: first phase and loops over output cells.
#pragma once

#include "kernels.h"
#include "sampling.h"

namespace bevperception::cpu {
namespace {

// Undisplaced positions of the points of a run of output cells in one output row, for a range of
// groups: x relative to the kernel centre of the run's first cell, y to the row's.
template <class T>
class TapGrid {
 public:
  TapGrid(const Dcnv3Sizes& sizes, int64_t groups, int64_t cells)
      : points_of_cell(groups * sizes.points()),
        cells_of_chunk(cells),
        memory_(3 * points_of_cell * cells * static_cast<int64_t>(sizeof(T))) {
    const int64_t count = points_of_cell * cells;
    tap_x = static_cast<T*>(memory_.data());
    tap_y = tap_x + count;
    centre_x = tap_y + count;
    int64_t i = 0;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t group = 0; group < groups; ++group) {
        for (int32_t point = 0; point < sizes.points(); ++point, ++i) {
          const Tap tap = kernel_tap(sizes, point);
          tap_x[i] = static_cast<T>(tap.x);
          tap_y[i] = static_cast<T>(tap.y);
          centre_x[i] = static_cast<T>(cell * sizes.stride);
        }
      }
    }
  }

  const int64_t points_of_cell, cells_of_chunk;
  T *tap_x, *tap_y, *centre_x;

 private:
  AlignedMemory memory_;
};

// A run of points of a chunk: where they lie.
template <class T>
struct ChunkPoints {
  const TapGrid<T>& grid;
  T centre_x, centre_y;  // of the chunk's first cell
  int32_t width, height;
  T offset_scale;

  ChunkPoints(const Dcnv3<T>& problem, const TapGrid<T>& tap_grid, int64_t out_y, int64_t out_x)
      : grid(tap_grid),
        centre_x(static_cast<T>(kernel_centre(problem.sizes, out_x))),
        centre_y(static_cast<T>(kernel_centre(problem.sizes, out_y))),
        width(static_cast<int32_t>(problem.sizes.width)),
        height(static_cast<int32_t>(problem.sizes.height)),
        offset_scale(problem.offset_scale) {}

  template <int N>
  using Axis = AxisSample<Vector<T, N>, Vector<int32_t, N>>;

  // Points i to i + N of the chunk, whose offsets begin at `offset`.
  template <int N>
  BEV_INLINE Pair<Axis<N>> sample(int64_t i, const T* offset) const {
    const auto moved = load_pairs<N>(offset);
    const auto scale = broadcast<N>(offset_scale);
    const auto x = tap_position(centre_x + load<N>(grid.centre_x + i), load<N>(grid.tap_x + i), moved.first, scale);
    const auto y = tap_position(broadcast<N>(centre_y), load<N>(grid.tap_y + i), moved.second, scale);
    return {sample_axis(x, broadcast<N>(static_cast<T>(width)), broadcast<N>(width)),
            sample_axis(y, broadcast<N>(static_cast<T>(height)), broadcast<N>(height))};
  }
};

template <class T>
struct FindTapCorners {
  const ChunkPoints<T>& points;
  Corners<T> corners;
  int64_t first;  // of the chunk
  const T* __restrict offset;
  const T* __restrict mask;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const auto sample = points.template sample<N>(first + i, offset + 2 * i);
    write_corners<N, T>(corners, first + i, sample.first, sample.second, load<N>(mask + i),
                        broadcast<N>(points.width), Vector<int32_t, N>{});
  }
};

// Gradients of a chunk's points from the products of dot_rows.
template <class T>
struct FinishTapGradients {
  const ChunkPoints<T>& points;
  const T* __restrict dots;  // (points, 4)
  const T* __restrict offset;
  const T* __restrict mask;
  T* __restrict offset_gradient;
  T* __restrict mask_gradient;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const auto sample = points.template sample<N>(i, offset + 2 * i);
    Vector<T, N> dot[4];
    load_quads<N, T>(dots + 4 * i, dot);
    const auto gradient =
        point_gradient(sample.first, sample.second, load<N>(mask + i), dot[0], dot[1], dot[2], dot[3]);
    const auto scale = broadcast<N>(points.offset_scale);
    store<N>(mask_gradient + i, gradient.weight);
    store_pairs<N, T>(offset_gradient + 2 * i, gradient.x * scale, gradient.y * scale);
  }
};

// Corners of a range of groups of a run of output cells.
template <class T>
BEV_INLINE void find_chunk_corners(const Dcnv3<T>& problem, const TapGrid<T>& grid, const HeadRange& groups,
                                   const ChunkPoints<T>& points, int64_t cell, int64_t cells,
                                   const Corners<T>& corners) {
  const bool contiguous = groups.count() == groups.heads;
  const int64_t runs = contiguous ? 1 : cells;
  const int64_t count = contiguous ? cells * grid.points_of_cell : grid.points_of_cell;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t i = ((cell + run) * groups.heads + groups.begin) * groups.points;
    for_blocks<T>(count,
                  FindTapCorners<T>{points, corners, run * count, problem.offset + 2 * i, problem.mask + i});
  }
}

BEV_INLINE HeadRange group_range(const Dcnv3Sizes& sizes, int64_t begin, int64_t end) {
  // Neighbouring outputs read neighbouring cells, which the cache still holds: nothing to prefetch.
  return {sizes.groups, sizes.channels, begin, end, sizes.points(), false};
}

BEV_INLINE int64_t cells_of_chunk(const Dcnv3Sizes& sizes, int64_t groups) {
  const int64_t cells = rows_of_chunk(groups * sizes.points());
  return cells < sizes.out_width ? cells : sizes.out_width;
}

// Calls visit(batch, first output cell of all, cells, points) for runs of cells in the rows (batch
// element, output row) from begin to end.
template <class T, class Visit>
BEV_INLINE void for_cell_chunks(const Dcnv3<T>& problem, int64_t begin, int64_t end, const TapGrid<T>& grid,
                                const Visit& visit) {
  const Dcnv3Sizes& sizes = problem.sizes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t x = 0; x < sizes.out_width; x += grid.cells_of_chunk) {
      const int64_t left = sizes.out_width - x;
      const ChunkPoints<T> points(problem, grid, row % sizes.out_height, x);
      visit(row / sizes.out_height, row * sizes.out_width + x, left < grid.cells_of_chunk ? left : grid.cells_of_chunk, points);
    }
  }
}

template <class T>
void dcnv3_point_gradients(const Dcnv3<T>& problem, const T* output_gradient, T* offset_gradient,
                           T* mask_gradient, int64_t begin, int64_t end) {
  const Dcnv3Sizes& sizes = problem.sizes;
  const HeadRange groups = group_range(sizes, 0, sizes.groups);
  const TapGrid<T> grid(sizes, sizes.groups, cells_of_chunk(sizes, sizes.groups));
  const Scratch<T> scratch(grid.points_of_cell * grid.cells_of_chunk);
  for_cell_chunks(problem, begin, end, grid,
                  [&](int64_t batch, int64_t cell, int64_t cells, const ChunkPoints<T>& points) {
                    const int64_t i = cell * grid.points_of_cell, count = cells * grid.points_of_cell;
                    find_chunk_corners(problem, grid, groups, points, cell, cells, scratch.corners());
                    const T* map = problem.input + batch * sizes.height * sizes.width * groups.cell_stride();
                    dot_rows(scratch.corners(), Rows{cell, cells, nullptr}, groups, map, output_gradient,
                             scratch.dots());
                    for_blocks<T>(count, FinishTapGradients<T>{points, scratch.dots(), problem.offset + 2 * i,
                                                               problem.mask + i, offset_gradient + 2 * i,
                                                               mask_gradient + i});
                  });
}

template <class T>
void dcnv3_input_gradient(const Dcnv3<T>& problem, const T* output_gradient, T* input_gradient,
                          const MapShare& share) {
  const Dcnv3Sizes& sizes = problem.sizes;
  const HeadRange groups = group_range(sizes, share.head_begin, share.head_end);
  const TapGrid<T> grid(sizes, groups.count(), cells_of_chunk(sizes, groups.count()));
  const Scratch<T> scratch(grid.points_of_cell * grid.cells_of_chunk);
  T* map_gradient = input_gradient + share.batch * sizes.height * sizes.width * groups.cell_stride();
  if (!share.is_zero) clear_heads(map_gradient, sizes.height * sizes.width, groups);
  const int64_t begin = share.batch * sizes.out_height;
  for_cell_chunks(problem, begin, begin + sizes.out_height, grid,
                  [&](int64_t, int64_t cell, int64_t cells, const ChunkPoints<T>& points) {
                    find_chunk_corners(problem, grid, groups, points, cell, cells, scratch.corners());
                    scatter_rows(scratch.corners(), Rows{cell, cells, nullptr}, groups, output_gradient,
                                 map_gradient);
                  });
}

}  // namespace
}  // namespace bevperception::cpu
