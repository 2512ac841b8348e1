// Deformable convolution v3: first phase and loops over output cells.
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
    for (int64_t i = 0; i < count; ++i) {
      const Tap tap = kernel_tap(sizes, static_cast<int32_t>(i % sizes.points()));
      tap_x[i] = static_cast<T>(tap.x);
      tap_y[i] = static_cast<T>(tap.y);
      centre_x[i] = static_cast<T>(i / points_of_cell * sizes.stride);
    }
  }

  const int64_t points_of_cell, cells_of_chunk;
  T *tap_x, *tap_y, *centre_x;

 private:
  AlignedMemory memory_;
};

// The part of the problem that all points of a chunk share.
template <class T>
struct ChunkOrigin {
  T centre_x, centre_y;
  int32_t width, height;
  T offset_scale;

  ChunkOrigin(const Dcnv3<T>& problem, int64_t out_y, int64_t out_x)
      : centre_x(static_cast<T>(kernel_centre(problem.sizes, out_x))),
        centre_y(static_cast<T>(kernel_centre(problem.sizes, out_y))),
        width(static_cast<int32_t>(problem.sizes.width)),
        height(static_cast<int32_t>(problem.sizes.height)),
        offset_scale(problem.offset_scale) {}

  BEV_INLINE AxisSample<T> sample_x(const TapGrid<T>& grid, const T* offset, int64_t first, int64_t i) const {
    const T centre = centre_x + grid.centre_x[first + i];
    return sample_axis(tap_position(centre, grid.tap_x[first + i], offset[2 * i], offset_scale), width);
  }
  BEV_INLINE AxisSample<T> sample_y(const TapGrid<T>& grid, const T* offset, int64_t first, int64_t i) const {
    return sample_axis(tap_position(centre_y, grid.tap_y[first + i], offset[2 * i + 1], offset_scale), height);
  }
};

// Corners of `count` points that lie one after the other, from `first` of the chunk.
template <class T>
BEV_INLINE void find_corners(const TapGrid<T>& grid, const ChunkOrigin<T>& origin, const T* __restrict offset,
                             const T* __restrict mask, int64_t first, int64_t count, const Corners<T>& corners) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const AxisSample<T> x = origin.sample_x(grid, offset, first, i), y = origin.sample_y(grid, offset, first, i);
    write_corner_weights(corners, first + i, x, y, mask[i]);
    write_corner_cells(corners, first + i, x, y, origin.width, 0);
  }
}

// Corners of a range of groups of a run of output cells.
template <class T>
BEV_INLINE void find_chunk_corners(const Dcnv3<T>& problem, const TapGrid<T>& grid, const HeadRange& groups,
                                   const ChunkOrigin<T>& origin, int64_t cell, int64_t cells,
                                   const Corners<T>& corners) {
  const bool contiguous = groups.count() == groups.heads;
  const int64_t runs = contiguous ? 1 : cells;
  const int64_t count = contiguous ? cells * grid.points_of_cell : grid.points_of_cell;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t i = ((cell + run) * groups.heads + groups.begin) * groups.points;
    find_corners(grid, origin, problem.offset + 2 * i, problem.mask + i, run * count, count, corners);
  }
}

template <class T>
BEV_INLINE void finish_point_gradients(const TapGrid<T>& grid, const ChunkOrigin<T>& origin,
                                       const T* __restrict offset, const T* __restrict mask,
                                       const T* __restrict dots, int64_t count, T* __restrict offset_gradient,
                                       T* __restrict mask_gradient) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const AxisSample<T> x = origin.sample_x(grid, offset, 0, i), y = origin.sample_y(grid, offset, 0, i);
    const PointGradient<T> gradient =
        point_gradient(x, y, mask[i], dots[4 * i], dots[4 * i + 1], dots[4 * i + 2], dots[4 * i + 3]);
    mask_gradient[i] = gradient.weight;
    offset_gradient[2 * i] = gradient.x * origin.offset_scale;
    offset_gradient[2 * i + 1] = gradient.y * origin.offset_scale;
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

// Calls visit(batch, first output cell of all, cells, origin) for runs of cells in the rows (batch
// element, output row) from begin to end.
template <class T, class Visit>
BEV_INLINE void for_cell_chunks(const Dcnv3<T>& problem, int64_t begin, int64_t end, int64_t chunk,
                                const Visit& visit) {
  const Dcnv3Sizes& sizes = problem.sizes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t x = 0; x < sizes.out_width; x += chunk) {
      const int64_t left = sizes.out_width - x;
      const ChunkOrigin<T> origin(problem, row % sizes.out_height, x);
      visit(row / sizes.out_height, row * sizes.out_width + x, left < chunk ? left : chunk, origin);
    }
  }
}

template <class T>
void dcnv3(const Dcnv3<T>& problem, T* output, int64_t begin, int64_t end) {
  const Dcnv3Sizes& sizes = problem.sizes;
  const HeadRange groups = group_range(sizes, 0, sizes.groups);
  const TapGrid<T> grid(sizes, sizes.groups, cells_of_chunk(sizes, sizes.groups));
  const Scratch<T> scratch(grid.points_of_cell * grid.cells_of_chunk);
  for_cell_chunks(problem, begin, end, grid.cells_of_chunk,
                  [&](int64_t batch, int64_t cell, int64_t cells, const ChunkOrigin<T>& origin) {
                    find_chunk_corners(problem, grid, groups, origin, cell, cells, scratch.corners());
                    const T* map = problem.input + batch * sizes.height * sizes.width * groups.cell_stride();
                    gather_rows(scratch.corners(), cells, groups, map, output + cell * groups.cell_stride());
                  });
}

template <class T>
void dcnv3_point_gradients(const Dcnv3<T>& problem, const T* output_gradient, T* offset_gradient,
                           T* mask_gradient, int64_t begin, int64_t end) {
  const Dcnv3Sizes& sizes = problem.sizes;
  const HeadRange groups = group_range(sizes, 0, sizes.groups);
  const TapGrid<T> grid(sizes, sizes.groups, cells_of_chunk(sizes, sizes.groups));
  const Scratch<T> scratch(grid.points_of_cell * grid.cells_of_chunk);
  for_cell_chunks(problem, begin, end, grid.cells_of_chunk,
                  [&](int64_t batch, int64_t cell, int64_t cells, const ChunkOrigin<T>& origin) {
                    const int64_t i = cell * grid.points_of_cell, count = cells * grid.points_of_cell;
                    find_chunk_corners(problem, grid, groups, origin, cell, cells, scratch.corners());
                    const T* map = problem.input + batch * sizes.height * sizes.width * groups.cell_stride();
                    dot_rows(scratch.corners(), cells, groups, map, output_gradient + cell * groups.cell_stride(),
                             scratch.dots());
                    finish_point_gradients(grid, origin, problem.offset + 2 * i, problem.mask + i, scratch.dots(),
                                           count, offset_gradient + 2 * i, mask_gradient + i);
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
  const int64_t begin = share.batch * sizes.out_height;
  for_cell_chunks(problem, begin, begin + sizes.out_height, grid.cells_of_chunk,
                  [&](int64_t, int64_t cell, int64_t cells, const ChunkOrigin<T>& origin) {
                    find_chunk_corners(problem, grid, groups, origin, cell, cells, scratch.corners());
                    scatter_rows(scratch.corners(), cells, groups, output_gradient + cell * groups.cell_stride(),
                                 map_gradient);
                  });
}

}  // namespace
}  // namespace bevperception::cpu
