// The inner loops that all operators share. A first phase (the operators' own) turns sampling points
// into corners: indices and weights of four cells each. Here is the second: multiply-adds of those
// cells over the channels of one head at a time, held in registers.
#pragma once

#include "../common/bilinear.h"
#include "memory.h"
#include "vectors.h"

namespace bevperception::cpu {
namespace {

// Corners of a run of points, four numbers a point: corner 2 * y + x is the cell (y, x) where 0 is the
// low and 1 the high cell of the axis. Where no cell is inside the map, the first index is -1 and the
// point is skipped.
template <class T>
struct Corners {
  T* __restrict weights;     // (points, 4)
  int32_t* __restrict cells;  // (points, 4)
};

// Memory for the corners of `capacity` points and four products for each.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t capacity)
      : capacity_(capacity), memory_(capacity * static_cast<int64_t>(8 * sizeof(T) + 4 * sizeof(int32_t))) {}

  Corners<T> corners() const {
    return {static_cast<T*>(memory_.data()), reinterpret_cast<int32_t*>(dots() + 4 * capacity_)};
  }
  T* dots() const { return static_cast<T*>(memory_.data()) + 4 * capacity_; }  // (points, 4)

 private:
  int64_t capacity_;
  AlignedMemory memory_;
};

// How heads lie in memory, and which of them a call works on.
struct HeadRange {
  int64_t heads, channels;  // of the tensors; a cell has heads * channels numbers
  int64_t begin, end;       // heads to work on; corners hold only these
  int64_t points;           // of a head
  bool prefetch;            // ask for cells ahead of their use; pays when the map exceeds the cache

  int64_t cell_stride() const { return heads * channels; }
  int64_t count() const { return end - begin; }
};

// The rows of a chunk: one after another from the first on, or as listed.
struct Rows {
  int64_t first, count;
  const int64_t* listed;  // null: one after another

  BEV_INLINE int64_t operator[](int64_t r) const { return listed == nullptr ? first + r : listed[r]; }
};

// Points whose corners are held at a time: small enough for the first-level cache.
constexpr int64_t kChunkPoints = 512;

BEV_INLINE int64_t rows_of_chunk(int64_t points_of_row) {
  return points_of_row < kChunkPoints ? kChunkPoints / (points_of_row > 0 ? points_of_row : 1) : 1;
}

// Points for which cells are prefetched ahead, roughly; long enough to cover the latency of memory.
constexpr int64_t kPrefetchPoints = 24;

// Writes the corners of N points from point i on. width and start: of their maps, in cells.
template <int N, class T, class Axis, class I>
BEV_INLINE void write_corners(const Corners<T>& corners, int64_t i, const Axis& x, const Axis& y,
                              const Vector<T, N>& weight, const I& width, const I& start) {
  const auto low = y.low_weight * weight, high = y.high_weight * weight;
  store_quads<N, T>(corners.weights + 4 * i, low * x.low_weight, low * x.high_weight, high * x.low_weight,
                    high * x.high_weight);
  const I row_low = start + y.low * width, row_high = start + y.high * width;
  const I some_inside = ((x.first > -2) & (y.first > -2)) ? row_low + x.low : constant<I, -1>();
  store_quads<N, int32_t>(corners.cells + 4 * i, some_inside, row_low + x.high, row_high + x.low,
                          row_high + x.high);
}

// Calls body.template run<N, COUNT>(channel) for consecutive blocks of COUNT vectors of N channels.
// CHANNELS: their number if it is known, which leaves only the calls, else 0.
template <class T, int CHANNELS, class Body>
BEV_INLINE void for_channel_blocks(int64_t channels_at_run_time, const Body& body) {
  constexpr int kFull = kWidth<T>;
  const int64_t channels = CHANNELS > 0 ? CHANNELS : channels_at_run_time;
  int64_t c = 0;
  for (; channels - c >= 4 * kFull; c += 4 * kFull) body.template run<kFull, 4>(c);
  for (; channels - c >= 2 * kFull; c += 2 * kFull) body.template run<kFull, 2>(c);
  if (channels - c >= kFull) body.template run<kFull, 1>(c), c += kFull;
  if constexpr (kFull > 8) {
    if (channels - c >= 8) body.template run<8, 1>(c), c += 8;
  }
  if constexpr (kFull > 4) {
    if (channels - c >= 4) body.template run<4, 1>(c), c += 4;
  }
  for (; c < channels; ++c) body.template run<1, 1>(c);
}

template <int LINES, int WRITE>
BEV_INLINE void prefetch_lines(const void* from) {
  for (int k = 0; k < LINES; ++k) __builtin_prefetch(static_cast<const char*>(from) + 64 * k, WRITE, 3);
}

template <class T, int N, int COUNT>
constexpr int lines_of_block() {
  return (N * COUNT * static_cast<int>(sizeof(T)) + 63) / 64;
}

// One (row, head): its points' corners and where its channels start in a map.
template <class T, bool PREFETCH>
struct HeadTask {
  const Corners<T>& corners;
  int64_t first, points;  // of the corners
  int64_t cell_stride;
  int64_t ahead_first;      // corners to prefetch
  int64_t ahead_channel;    // their head's first channel

  template <int LINES, int WRITE, class Map>
  BEV_INLINE void prefetch(Map* map_of_cell_0, int64_t p, int64_t c) const {
    if constexpr (PREFETCH) {
      for (int k = 0; k < 4; ++k) {
        const int64_t cell = corners.cells[4 * (ahead_first + p) + k];
        prefetch_lines<LINES, WRITE>(map_of_cell_0 + cell * cell_stride + ahead_channel + c);
      }
    }
  }
};

template <class T, bool PREFETCH>
struct Gather {
  const HeadTask<T, PREFETCH>& task;
  const T* map;      // cell 0, channel 0 of head 0
  int64_t channel;   // first of the head
  T* output;         // of the (row, head)

  template <int N, int COUNT>
  BEV_INLINE void run(int64_t c) const {
    constexpr int kSums = COUNT > 2 ? 2 : 4;  // independent chains of additions, as registers allow
    Vector<T, N> sum[kSums][COUNT] = {};
    const int32_t* cells = task.corners.cells + 4 * task.first;
    const T* weights = task.corners.weights + 4 * task.first;
    for (int64_t p = 0; p < task.points; ++p, cells += 4, weights += 4) {
      task.template prefetch<lines_of_block<T, N, COUNT>(), 0>(map, p, c);
      if (cells[0] < 0) continue;
      for (int k = 0; k < 4; ++k) {
        const T* cell = map + cells[k] * task.cell_stride + channel + c;
        const Vector<T, N> weight = broadcast<N>(weights[k]);
        for (int j = 0; j < COUNT; ++j) sum[k % kSums][j] += weight * load<N>(cell + j * N);
      }
    }
    for (int j = 0; j < COUNT; ++j) {
      Vector<T, N> total = sum[0][j] + sum[1][j];
      if constexpr (kSums == 4) total += sum[2][j] + sum[3][j];
      store<N>(output + c + j * N, total);
    }
  }
};

template <class T, bool PREFETCH>
struct Dot {
  const HeadTask<T, PREFETCH>& task;
  const T* map;
  int64_t channel;
  const T* gradient;  // of the (row, head)'s output
  T* dots;            // (points, 4) of the (row, head)

  template <int N, int COUNT>
  BEV_INLINE void run(int64_t c) const {
    Vector<T, N> g[COUNT];
    for (int j = 0; j < COUNT; ++j) g[j] = load<N>(gradient + c + j * N);
    const int32_t* cells = task.corners.cells + 4 * task.first;
    for (int64_t p = 0; p < task.points; ++p, cells += 4) {
      task.template prefetch<lines_of_block<T, N, COUNT>(), 0>(map, p, c);
      T sums[4] = {};
      if (cells[0] >= 0) {
        Vector<T, N> product[4];
        for (int k = 0; k < 4; ++k) {
          const T* cell = map + cells[k] * task.cell_stride + channel + c;
          product[k] = g[0] * load<N>(cell);
          for (int j = 1; j < COUNT; ++j) product[k] += g[j] * load<N>(cell + j * N);
        }
        four_sums<N, T>(product[0], product[1], product[2], product[3], sums);
      }
      if (c == 0) {
        for (int k = 0; k < 4; ++k) dots[4 * p + k] = sums[k];
      } else {
        for (int k = 0; k < 4; ++k) dots[4 * p + k] += sums[k];
      }
    }
  }
};

template <class T, bool PREFETCH>
struct Scatter {
  const HeadTask<T, PREFETCH>& task;
  T* map;  // gradient of the map
  int64_t channel;
  const T* gradient;  // of the (row, head)'s output

  template <int N, int COUNT>
  BEV_INLINE void run(int64_t c) const {
    Vector<T, N> g[COUNT];
    for (int j = 0; j < COUNT; ++j) g[j] = load<N>(gradient + c + j * N);
    const int32_t* cells = task.corners.cells + 4 * task.first;
    const T* weights = task.corners.weights + 4 * task.first;
    for (int64_t p = 0; p < task.points; ++p, cells += 4, weights += 4) {
      task.template prefetch<lines_of_block<T, N, COUNT>(), 1>(map, p, c);
      if (cells[0] < 0) continue;
      for (int k = 0; k < 4; ++k) {
        T* cell = map + cells[k] * task.cell_stride + channel + c;
        const Vector<T, N> weight = broadcast<N>(weights[k]);
        for (int j = 0; j < COUNT; ++j) store<N>(cell + j * N, load<N>(cell + j * N) + weight * g[j]);
      }
    }
  }
};

// Calls visit(row, head, task) for every head of every row.
template <class T, bool PREFETCH, class Visit>
BEV_INLINE void for_heads(const Corners<T>& corners, const Rows& rows, const HeadRange& heads, const Visit& visit) {
  const int64_t steps = (kPrefetchPoints + heads.points - 1) / (heads.points > 0 ? heads.points : 1);
  const int64_t last = rows.count * heads.count() - 1;
  int64_t first = 0;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = rows[r];
    for (int64_t head = heads.begin; head < heads.end; ++head, first += heads.points) {
      HeadTask<T, PREFETCH> task{corners, first, heads.points, heads.cell_stride(), 0, 0};
      if constexpr (PREFETCH) {
        int64_t ahead = r * heads.count() + head - heads.begin + steps;
        ahead = ahead < last ? ahead : last;
        task.ahead_first = ahead * heads.points;
        task.ahead_channel = (heads.begin + ahead % heads.count()) * heads.channels;
      }
      visit(row, head, task);
    }
  }
}

// Calls body.template run<PREFETCH, CHANNELS>(), with the usual numbers of channels made known.
template <class T, class Body>
BEV_INLINE void for_layout(const HeadRange& heads, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (heads.channels == 32) return heads.prefetch ? body.template run<true, 32>() : body.template run<false, 32>();
    if (heads.channels == 16 && !heads.prefetch) return body.template run<false, 16>();
  }
  heads.prefetch ? body.template run<true, 0>() : body.template run<false, 0>();
}

// Rows of output (all rows, heads, channels) = weighted sums of the cells of `map`.
template <class T>
struct GatherRows {
  Corners<T> corners;
  const Rows& rows;
  const HeadRange& heads;
  const T* map;
  T* output;

  template <bool PREFETCH, int CHANNELS>
  void run() const {
    for_heads<T, PREFETCH>(corners, rows, heads, [&](int64_t row, int64_t head, const HeadTask<T, PREFETCH>& task) {
      const int64_t channel = head * heads.channels;
      for_channel_blocks<T, CHANNELS>(
          heads.channels, Gather<T, PREFETCH>{task, map, channel, output + row * heads.cell_stride() + channel});
    });
  }
};

// dots (rows, heads in range, points, 4) = products of the output's gradient with the four cells.
template <class T>
struct DotRows {
  Corners<T> corners;
  const Rows& rows;
  const HeadRange& heads;
  const T* map;
  const T* gradient;  // of the output: (all rows, heads, channels)
  T* dots;

  template <bool PREFETCH, int CHANNELS>
  void run() const {
    for_heads<T, PREFETCH>(corners, rows, heads, [&](int64_t row, int64_t head, const HeadTask<T, PREFETCH>& task) {
      const int64_t channel = head * heads.channels;
      for_channel_blocks<T, CHANNELS>(
          heads.channels, Dot<T, PREFETCH>{task, map, channel, gradient + row * heads.cell_stride() + channel,
                                           dots + 4 * task.first});
    });
  }
};

// Clears a range of heads of all cells of a map: just before its use, so that the cache holds it.
template <class T>
BEV_INLINE void clear_heads(T* map, int64_t cells, const HeadRange& heads) {
  const bool contiguous = heads.count() == heads.heads;
  const int64_t runs = contiguous ? 1 : cells;
  const int64_t count = (contiguous ? cells : 1) * heads.count() * heads.channels;
  for (int64_t run = 0; run < runs; ++run) {
    T* first = map + run * heads.cell_stride() + heads.begin * heads.channels;
    __builtin_memset(first, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

// map_gradient += the output's gradient, spread over the four cells of each point.
template <class T>
struct ScatterRows {
  Corners<T> corners;
  const Rows& rows;
  const HeadRange& heads;
  const T* gradient;
  T* map_gradient;

  template <bool PREFETCH, int CHANNELS>
  void run() const {
    for_heads<T, PREFETCH>(corners, rows, heads, [&](int64_t row, int64_t head, const HeadTask<T, PREFETCH>& task) {
      const int64_t channel = head * heads.channels;
      for_channel_blocks<T, CHANNELS>(
          heads.channels,
          Scatter<T, PREFETCH>{task, map_gradient, channel, gradient + row * heads.cell_stride() + channel});
    });
  }
};

template <class T>
BEV_INLINE void gather_rows(const Corners<T>& corners, const Rows& rows, const HeadRange& heads, const T* map,
                            T* output) {
  for_layout<T>(heads, GatherRows<T>{corners, rows, heads, map, output});
}

template <class T>
BEV_INLINE void dot_rows(const Corners<T>& corners, const Rows& rows, const HeadRange& heads, const T* map,
                         const T* gradient, T* dots) {
  for_layout<T>(heads, DotRows<T>{corners, rows, heads, map, gradient, dots});
}

template <class T>
BEV_INLINE void scatter_rows(const Corners<T>& corners, const Rows& rows, const HeadRange& heads, const T* gradient,
                             T* map_gradient) {
  for_layout<T>(heads, ScatterRows<T>{corners, rows, heads, gradient, map_gradient});
}

}  // namespace
}  // namespace bevperception::cpu
