// Multi-scale deformable attention: first phase and loops over queries.
#pragma once

#include "kernels.h"
#include "sampling.h"

namespace bevperception::cpu {
namespace {

// The level of each point of a row's head range, one array a quantity.
template <class T>
class PointLevels {
 public:
  PointLevels(int64_t level_count, int64_t points, const Level* level_of, int64_t heads)
      : count(heads * level_count * points),
        memory_(count * static_cast<int64_t>(2 * sizeof(T) + 3 * sizeof(int32_t))) {
    width = static_cast<T*>(memory_.data());
    height = width + count;
    columns = reinterpret_cast<int32_t*>(height + count);
    rows = columns + count;
    start = rows + count;
    for (int64_t i = 0; i < count; ++i) {
      const Level& level = level_of[i / points % level_count];
      width[i] = static_cast<T>(level.width);
      height[i] = static_cast<T>(level.height);
      columns[i] = level.width;
      rows[i] = level.height;
      start[i] = level.start;
    }
  }

  PointLevels(const MsDeformAttn<T>& problem, int64_t heads)
      : PointLevels(problem.sizes.levels, problem.sizes.points, problem.levels, heads) {}

  const int64_t count;
  T *width, *height;
  int32_t *columns, *rows, *start;

 private:
  AlignedMemory memory_;
};

// One row's head range: where its points lie.
template <class T>
struct RowPoints {
  const PointLevels<T>& levels;
  const T* __restrict locations;
  const T* __restrict weights;

  template <int N>
  using Axis = AxisSample<Vector<T, N>, Vector<int32_t, N>>;

  template <int N>
  BEV_INLINE Pair<Axis<N>> sample(int64_t i) const {
    const auto location = load_pairs<N>(locations + 2 * i);
    const auto width = load<N>(levels.width + i), height = load<N>(levels.height + i);
    return {sample_axis(location_to_position<T>(location.first, width), width, load<N>(levels.columns + i)),
            sample_axis(location_to_position<T>(location.second, height), height, load<N>(levels.rows + i))};
  }
};

template <class T>
struct FindCorners {
  RowPoints<T> row;
  Corners<T> corners;
  int64_t first;  // of the scratch

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const auto sample = row.template sample<N>(i);
    write_corners<N, T>(corners, first + i, sample.first, sample.second, load<N>(row.weights + i),
                        load<N>(row.levels.columns + i), load<N>(row.levels.start + i));
  }
};

// Gradients of one row's head range from the products of dot_rows.
template <class T>
struct FinishPointGradients {
  RowPoints<T> row;
  const T* __restrict dots;  // (points, 4)
  T* __restrict locations_gradient;
  T* __restrict weights_gradient;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const auto sample = row.template sample<N>(i);
    Vector<T, N> dot[4];
    load_quads<N, T>(dots + 4 * i, dot);
    const auto gradient = point_gradient(sample.first, sample.second, load<N>(row.weights + i), dot[0], dot[1],
                                         dot[2], dot[3]);
    store<N>(weights_gradient + i, gradient.weight);
    store_pairs<N, T>(locations_gradient + 2 * i, gradient.x * load<N>(row.levels.width + i),
                      gradient.y * load<N>(row.levels.height + i));
  }
};

template <class T>
BEV_INLINE HeadRange head_range(const MsDeformAttnSizes& sizes, int64_t begin, int64_t end) {
  const int64_t map_bytes = sizes.cells * sizes.heads * sizes.channels * static_cast<int64_t>(sizeof(T));
  return {sizes.heads, sizes.channels, begin, end, sizes.levels * sizes.points, map_bytes > kLargeMapBytes};
}

// The rows from place `first` on of an order; null: as they come.
BEV_INLINE Rows rows_from(const int64_t* order, int64_t first, int64_t count) {
  return {first, count, order == nullptr ? nullptr : order + first};
}

// Calls visit(batch element, rows) for chunks of rows (batch element, query) within one batch element. Those of one
// come together in an order, too.
template <class Visit>
BEV_INLINE void for_row_chunks(int64_t begin, int64_t end, int64_t queries, const int64_t* order, int64_t chunk,
                               const Visit& visit) {
  for (int64_t place = begin; place < end;) {
    const int64_t batch = place / queries, of_batch = (batch + 1) * queries;
    int64_t count = end - place;
    if (count > chunk) count = chunk;
    if (count > of_batch - place) count = of_batch - place;
    visit(batch, rows_from(order, place, count));
    place += count;
  }
}

template <class T>
void ms_deform_attn(const MsDeformAttn<T>& problem, T* output, int64_t begin, int64_t end) {
  const MsDeformAttnSizes& sizes = problem.sizes;
  const HeadRange heads = head_range<T>(sizes, 0, sizes.heads);
  const PointLevels<T> levels(problem, sizes.heads);
  const int64_t chunk = rows_of_chunk(levels.count);
  const Scratch<T> scratch(chunk * levels.count);
  for_row_chunks(begin, end, sizes.queries, problem.row_order, chunk, [&](int64_t batch, const Rows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t first = rows[r] * levels.count;
      const RowPoints<T> points{levels, problem.locations + 2 * first, problem.weights + first};
      for_blocks<T>(levels.count, FindCorners<T>{points, scratch.corners(), r * levels.count});
    }
    const T* map = problem.value + batch * sizes.cells * heads.cell_stride();
    gather_rows(scratch.corners(), rows, heads, map, output);
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
  for_row_chunks(begin, end, sizes.queries, problem.row_order, chunk, [&](int64_t batch, const Rows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows[r] * levels.count;
      const RowPoints<T> points{levels, problem.locations + 2 * i, problem.weights + i};
      for_blocks<T>(levels.count, FindCorners<T>{points, scratch.corners(), r * levels.count});
    }
    const T* map = problem.value + batch * sizes.cells * heads.cell_stride();
    dot_rows(scratch.corners(), rows, heads, map, output_gradient, scratch.dots());
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows[r] * levels.count;
      const RowPoints<T> points{levels, problem.locations + 2 * i, problem.weights + i};
      for_blocks<T>(levels.count, FinishPointGradients<T>{points, scratch.dots() + 4 * r * levels.count,
                                                          locations_gradient + 2 * i, weights_gradient + i});
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
  if (!share.is_zero) clear_heads(map_gradient, sizes.cells, heads);
  const int64_t* const order = problem.row_order;
  for_row_chunks(begin, begin + sizes.queries, sizes.queries, order, chunk, [&](int64_t, const Rows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t first = (rows[r] * sizes.heads + heads.begin) * heads.points;
      const RowPoints<T> points{levels, problem.locations + 2 * first, problem.weights + first};
      for_blocks<T>(levels.count, FindCorners<T>{points, scratch.corners(), r * levels.count});
    }
    scatter_rows(scratch.corners(), rows, heads, output_gradient, map_gradient);
  });
}

}  // namespace
}  // namespace bevperception::cpu
