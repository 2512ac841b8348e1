// Deformable attention from raw offsets and logits: locations, softmax and the mean over the maps that
// a row looks into are made here, in the first-level cache, and never written out.
#pragma once

#include "ms_deform_attn.h"
#include "softmax.h"

namespace bevperception::cpu {
namespace {

// Where each (level, point) of an entry starts from, in cells of its level, repeated for all heads.
template <class T>
class Starts {
 public:
  Starts(const DeformAttn<T>& problem, const PointLevels<T>& levels)
      : problem_(problem), levels_(levels), memory_(2 * levels.count * static_cast<int64_t>(sizeof(T))) {
    x = static_cast<T*>(memory_.data());
    y = x + levels.count;
  }

  BEV_INLINE void set(int64_t entry) const {
    if (levels_.count == 0) return;
    const int64_t samples = problem_.sizes.levels * problem_.sizes.points;
    const T* references = problem_.references + entry * problem_.anchors * 2;
    for (int64_t i = 0; i < samples; ++i) {
      const T* reference = references + 2 * problem_.anchor_of[i];
      x[i] = location_to_position<T>(reference[0], levels_.width[i]);
      y[i] = location_to_position<T>(reference[1], levels_.height[i]);
    }
    for (int64_t i = samples; i < levels_.count; ++i) x[i] = x[i - samples], y[i] = y[i - samples];
  }

  T *x, *y;

 private:
  const DeformAttn<T>& problem_;
  const PointLevels<T>& levels_;
  AlignedMemory memory_;
};

template <class T>
struct FindCornersFromStarts {
  const PointLevels<T>& levels;
  const Starts<T>& starts;
  const T* __restrict offsets;  // in cells
  const T* __restrict weights;
  Corners<T> corners;
  int64_t first;       // of the corners
  int32_t map_start;   // cells of the maps before

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    using I = Vector<int32_t, N>;
    const auto offset = load_pairs<N>(offsets + 2 * i);
    const I columns = load<N>(levels.columns + i);
    const auto x = sample_axis(offset.first + load<N>(starts.x + i), load<N>(levels.width + i), columns);
    const auto y = sample_axis(offset.second + load<N>(starts.y + i), load<N>(levels.height + i),
                               load<N>(levels.rows + i));
    write_corners<N, T>(corners, first + i, x, y, load<N>(weights + i), columns,
                        I(load<N>(levels.start + i) + map_start));
  }
};

// The work on one range of rows: entries are collected until a chunk is full, then sampled together.
template <class T>
class RowRange {
 public:
  RowRange(const DeformAttn<T>& problem, T* output)
      : problem_(problem),
        output_(output),
        heads_(head_range<T>(problem.sizes, 0, problem.sizes.heads)),
        levels_(problem.sizes.levels, problem.sizes.points, problem.levels, problem.sizes.heads),
        starts_(problem, levels_),
        chunk_(rows_of_chunk(levels_.count)),
        scratch_(chunk_ * levels_.count),
        weights_(levels_.count * static_cast<int64_t>(sizeof(T))),
        sampled_(chunk_ * heads_.cell_stride() * static_cast<int64_t>(sizeof(T))),
        rows_(chunk_ * static_cast<int64_t>(sizeof(int64_t))) {}

  // Each row looks into one map: rows are shared out evenly among the maps, in order.
  void run_plain(int64_t begin, int64_t end) const {
    for (int64_t place = begin; place < end; place += chunk_) {
      const Rows rows = rows_from(problem_.row_order, place, end - place < chunk_ ? end - place : chunk_);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t row = rows[r];
        set_weights(row, 1);
        find_corners(row, row, row / problem_.sizes.queries, r);
      }
      gather_rows(scratch_.corners(), rows, heads_, problem_.value, output_);
    }
  }

  // Row r looks into the maps map_of[row_start[r]] to map_of[row_start[r + 1] - 1].
  void run_compressed(int64_t begin, int64_t end) const {
    const int64_t width = heads_.cell_stride();
    const Rows rows = rows_from(problem_.row_order, begin, end - begin);
    int64_t collected = 0;
    int64_t* const row_of = static_cast<int64_t*>(rows_.data());
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t row = rows[r];
      __builtin_memset(output_ + row * width, 0, static_cast<size_t>(width) * sizeof(T));
      const int64_t first = problem_.row_start[row], entries = problem_.row_start[row + 1] - first;
      if (entries > 0) set_weights(row, entries);
      for (int64_t entry = first; entry < first + entries; ++entry) {
        find_corners(row, entry, problem_.map_of[entry], collected);
        row_of[collected++] = row;
        if (collected == chunk_) add_collected(collected), collected = 0;
      }
    }
    add_collected(collected);
  }

 private:
  BEV_INLINE void set_weights(int64_t row, int64_t entries) const {
    const int64_t runs = problem_.sizes.heads * problem_.groups;
    if (levels_.count == 0) return;
    softmax_runs<T>(problem_.logits + row * problem_.logits_stride, runs, levels_.count / runs,
                    T(1) / static_cast<T>(problem_.groups * entries), static_cast<T*>(weights_.data()));
  }

  BEV_INLINE void find_corners(int64_t row, int64_t entry, int64_t map, int64_t place) const {
    starts_.set(entry);
    for_blocks<T>(levels_.count,
                  FindCornersFromStarts<T>{levels_, starts_, problem_.offsets + row * problem_.offsets_stride,
                                           static_cast<const T*>(weights_.data()), scratch_.corners(),
                                           place * levels_.count, static_cast<int32_t>(map * problem_.sizes.cells)});
  }

  void add_collected(int64_t entries) const {
    const int64_t width = heads_.cell_stride();
    T* const sampled = static_cast<T*>(sampled_.data());
    gather_rows(scratch_.corners(), Rows{0, entries, nullptr}, heads_, problem_.value, sampled);
    const int64_t* const row_of = static_cast<const int64_t*>(rows_.data());
    for (int64_t e = 0; e < entries; ++e) {
      T* __restrict const sum = output_ + row_of[e] * width;
      const T* __restrict const part = sampled + e * width;
      for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
    }
  }

  const DeformAttn<T>& problem_;
  T* output_;
  HeadRange heads_;
  PointLevels<T> levels_;
  Starts<T> starts_;
  int64_t chunk_;  // entries
  Scratch<T> scratch_;
  AlignedMemory weights_, sampled_, rows_;
};

template <class T>
void deform_attn(const DeformAttn<T>& problem, T* output, int64_t begin, int64_t end) {
  const RowRange<T> range(problem, output);
  problem.row_start == nullptr ? range.run_plain(begin, end) : range.run_compressed(begin, end);
}

}  // namespace
}  // namespace bevperception::cpu
