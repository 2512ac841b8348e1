// Gradients of deformable attention from raw offsets and logits. First those of what the rows ask for, row by
// row; then that of the maps, map by map, so that no two threads write to the same numbers and every number is
// summed in one order.
#pragma once

#include "deform_attn.h"

namespace bevperception::cpu {
namespace {

// Adds the gradients of one entry's points to its row's.
template <class T>
struct FinishEntry {
  const PointLevels<T>& levels;
  const Starts<T>& starts;
  const T* __restrict offsets;
  const T* __restrict weights;
  const T* __restrict dots;  // (points, 4)
  T* __restrict of_offsets;
  T* __restrict of_weights;
  T* __restrict of_starts;  // by (x, y) as fractions of the map; this entry's alone

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    using I = Vector<int32_t, N>;
    const auto offset = load_pairs<N>(offsets + 2 * i);
    const auto width = load<N>(levels.width + i), height = load<N>(levels.height + i);
    const auto x = sample_axis(offset.first + load<N>(starts.x + i), width, I(load<N>(levels.columns + i)));
    const auto y = sample_axis(offset.second + load<N>(starts.y + i), height, I(load<N>(levels.rows + i)));
    Vector<T, N> dot[4];
    load_quads<N, T>(dots + 4 * i, dot);
    const auto gradient = point_gradient(x, y, load<N>(weights + i), dot[0], dot[1], dot[2], dot[3]);
    store<N>(of_weights + i, load<N>(of_weights + i) + gradient.weight);
    const auto sum = load_pairs<N>(of_offsets + 2 * i);
    store_pairs<N, T>(of_offsets + 2 * i, sum.first + gradient.x, sum.second + gradient.y);
    store_pairs<N, T>(of_starts + 2 * i, gradient.x * width, gradient.y * height);
  }
};

// of_logits = gradients by the logits, from those by the weights, where weights = scale * softmax of each run.
template <class T>
BEV_INLINE void softmax_gradient(const T* weights, const T* of_weights, int64_t runs, int64_t length, T scale,
                                 T* __restrict of_logits) {
  for (int64_t run = 0; run < runs; ++run) {
    const T* const weight = weights + run * length;
    const T* const gradient = of_weights + run * length;
    T mean = 0;
    for (int64_t i = 0; i < length; ++i) mean += weight[i] * gradient[i];
    mean /= scale;
    for (int64_t i = 0; i < length; ++i) of_logits[run * length + i] = weight[i] * (gradient[i] - mean);
  }
}

// The entries (map and row) of a problem.
template <class T>
struct Entries {
  const DeformAttn<T>& problem;

  BEV_INLINE int64_t first(int64_t row) const { return problem.row_start == nullptr ? row : problem.row_start[row]; }
  BEV_INLINE int64_t count(int64_t row) const { return first(row + 1) - first(row); }
  BEV_INLINE int64_t map(int64_t entry) const {
    return problem.row_start == nullptr ? entry / problem.sizes.queries : problem.map_of[entry];
  }
};

template <class T>
void deform_attn_point_gradients(const DeformAttn<T>& problem, const T* output_gradient,
                                 const DeformAttnGradients<T>& gradients, int64_t begin, int64_t end) {
  const HeadRange heads = head_range<T>(problem.sizes, 0, problem.sizes.heads);
  const PointLevels<T> levels(problem.sizes.levels, problem.sizes.points, problem.levels, problem.sizes.heads);
  const Starts<T> starts(problem, levels);
  const Scratch<T> scratch(levels.count);
  const int64_t points = levels.count, samples = problem.sizes.levels * problem.sizes.points;
  const AlignedMemory memory(3 * points * static_cast<int64_t>(sizeof(T)));
  T* const of_weights = static_cast<T*>(memory.data());
  T* const of_starts = of_weights + points;
  const Entries<T> entries{problem};
  const int64_t runs = problem.sizes.heads * problem.groups;
  const Rows rows = rows_from(problem.row_order, begin, end - begin);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = rows[r];
    T* const weights = gradients.weights + row * points;
    T* const of_offsets = gradients.of_offsets + row * 2 * points;
    __builtin_memset(of_offsets, 0, static_cast<size_t>(2 * points) * sizeof(T));
    const int64_t count = entries.count(row);
    if (count == 0 || points == 0) {
      __builtin_memset(weights, 0, static_cast<size_t>(points) * sizeof(T));
      __builtin_memset(gradients.of_logits + row * points, 0, static_cast<size_t>(points) * sizeof(T));
      continue;
    }
    const T scale = T(1) / static_cast<T>(problem.groups * count);
    softmax_runs<T>(problem.logits + row * problem.logits_stride, runs, points / runs, scale, weights);
    __builtin_memset(of_weights, 0, static_cast<size_t>(points) * sizeof(T));
    const T* const offsets = problem.offsets + row * problem.offsets_stride;
    for (int64_t entry = entries.first(row); entry < entries.first(row) + count; ++entry) {
      const auto map_start = static_cast<int32_t>(entries.map(entry) * problem.sizes.cells);
      starts.set(entry);
      for_blocks<T>(points, FindCornersFromStarts<T>{levels, starts, offsets, weights, scratch.corners(), 0, map_start});
      dot_rows(scratch.corners(), Rows{row, 1, nullptr}, heads, problem.value, output_gradient, scratch.dots());
      for_blocks<T>(points, FinishEntry<T>{levels, starts, offsets, weights, scratch.dots(), of_offsets, of_weights,
                                           of_starts});
      if (gradients.of_references == nullptr) continue;
      T* const of_references = gradients.of_references + entry * problem.anchors * 2;
      for (int64_t i = 0; i < points; ++i) {
        T* const reference = of_references + 2 * problem.anchor_of[i % samples];
        reference[0] += of_starts[2 * i];
        reference[1] += of_starts[2 * i + 1];
      }
    }
    softmax_gradient<T>(weights, of_weights, runs, points / runs, scale, gradients.of_logits + row * points);
  }
}

template <class T>
void deform_attn_value_gradient(const DeformAttn<T>& problem, const T* output_gradient, const T* weights,
                                const EntriesByMap& by_map, T* value_gradient, const MapShare& share) {
  const HeadRange heads = head_range<T>(problem.sizes, share.head_begin, share.head_end);
  const PointLevels<T> levels(problem.sizes.levels, problem.sizes.points, problem.levels, heads.count());
  const Starts<T> starts(problem, levels);
  const Scratch<T> scratch(levels.count);
  const int64_t points_of_row = problem.sizes.heads * heads.points, first_point = heads.begin * heads.points;
  T* const map_gradient = value_gradient + share.batch * problem.sizes.cells * heads.cell_stride();
  if (!share.is_zero) clear_heads(map_gradient, problem.sizes.cells, heads);
  for (int64_t i = by_map.map_start[share.batch]; i < by_map.map_start[share.batch + 1]; ++i) {
    const int64_t entry = by_map.entry_of == nullptr ? i : by_map.entry_of[i];
    const int64_t row = by_map.row_of == nullptr ? i : by_map.row_of[i];
    starts.set(entry);
    for_blocks<T>(levels.count,
                  FindCornersFromStarts<T>{levels, starts, problem.offsets + row * problem.offsets_stride + 2 * first_point,
                                           weights + row * points_of_row + first_point, scratch.corners(), 0, 0});
    scatter_rows(scratch.corners(), Rows{row, 1, nullptr}, heads, output_gradient, map_gradient);
  }
}

}  // namespace
}  // namespace bevperception::cpu
