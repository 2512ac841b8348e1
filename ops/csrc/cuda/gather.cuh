// The kernels that all operators share. A task is one (row, head): its output is a weighted sum of cells over
// the channels of the head. A team of threads works on it, each on 16 bytes of channels. The team finds the
// corners of as many points as it has threads, one each, puts them into shared memory, and then all of it
// runs through them.
//
// An operator is a class with
//   Storage; kSoftmax                number type of the maps; whether weights come by a softmax
//   batch(), tasks                   batch elements, and tasks of each
//   channels, cell_stride()          numbers of a head, and from a cell of a map to the next
//   samples, groups                  sampling points of a task, in so many equal softmax groups
//   open(batch, task)                what is known of a task; with entries `first` to `end`, and `scale`
//   map_offset(task, entry)          first number of the head in the map's cell 0
//   place(task, entry, sample)       where a point lies: position in cells, weight or logit, level
// and for backward write(), add_reference() and set_logit_gradient(); see attention.cuh.
#pragma once

#include "kernels.h"
#include "types.cuh"

namespace bevperception::cuda {

constexpr int kThreads = 256;

// Where the grid stands: batch elements along y and z, tasks of one along x, so that no thread needs to divide
// numbers of 64 bits.
__device__ inline int64_t batch_of_block() { return blockIdx.y + int64_t(gridDim.y) * blockIdx.z; }

template <class R>
struct Place {
  R x, y;    // position in cells of the level
  R weight;  // or logit
  Level level;
};

// Cells and weights of a point; the cell is -1 where it is outside the map.
template <class R>
struct alignas(16) Corners {
  R weight[4];
  int32_t cell[4];
};

template <class R>
using Axis = AxisSample<R, int32_t>;

template <class R>
__device__ inline Corners<R> corners_of(const Level& level, const Axis<R>& x, const Axis<R>& y, R weight) {
  Corners<R> corners;
  const int32_t columns[2] = {x.low, x.high}, rows[2] = {y.low, y.high};
  const R along_x[2] = {x.low_weight, x.high_weight}, along_y[2] = {y.low_weight, y.high_weight};
  const bool in_x[2] = {x.low_inside > 0, x.high_inside > 0}, in_y[2] = {y.low_inside > 0, y.high_inside > 0};
  const bool some_inside = x.first > -2 && y.first > -2;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int column = k % 2, row = k / 2;
    const bool inside = some_inside && in_x[column] && in_y[row];
    corners.cell[k] = inside ? level.start + rows[row] * level.width + columns[column] : -1;
    corners.weight[k] = weight * along_x[column] * along_y[row];
  }
  return corners;
}

// Weights of a softmax over one group of a task's logits: exp(logit - largest) / sum.
template <class R>
struct Softmax {
  R largest, factor;

  __device__ R weight(R logit) const { return exp(logit - largest) * factor; }
};

template <class Op>
__device__ inline Softmax<Real<typename Op::Storage>> softmax_of(const Op& op, const typename Op::Task& task,
                                                                int first, int end, const Team& team) {
  using R = Real<typename Op::Storage>;
  if constexpr (!Op::kSoftmax) {
    return {};
  } else {
    R largest = op.logit(task, first);
    for (int p = first + team.lane; p < end; p += team.lanes) {
      const R logit = op.logit(task, p);
      largest = logit > largest ? logit : largest;
    }
    largest = team.largest(largest);
    R sum = 0;
    for (int p = first + team.lane; p < end; p += team.lanes) sum += exp(op.logit(task, p) - largest);
    return {largest, R(1) / team.sum(sum)};
  }
}

template <class Op, int WIDE>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(Op op, typename Op::Storage* output, int lanes) {
  using S = typename Op::Storage;
  using R = Real<S>;
  BEV_SHARED(Corners<R>, shared, kThreads);
  const Team team(lanes);
  const int64_t batch = batch_of_block();
  const uint32_t of_batch = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
  if (batch >= op.batch() || of_batch >= op.tasks) return;  // whole teams: no thread waits for another
  const int64_t index = batch * op.tasks + of_batch;
  Corners<R>* const corners = shared + threadIdx.x - team.lane;
  const auto task = op.open(batch, of_batch);
  const int of_group = op.samples / op.groups;
  // Channels beyond one round of the team are rare (more than 32 threads' worth).
  for (int64_t round = 0; round < op.channels; round += lanes * WIDE) {
    const int64_t channel = round + team.lane * WIDE;
    const bool has_channels = channel < op.channels;
    R sum[WIDE] = {};
    for (int64_t entry = task.first; entry < task.end; ++entry) {
      const S* const map = op.map + op.map_offset(task, entry) + channel;
      for (int begin = 0; begin < op.samples; begin += of_group) {
        const auto softmax = softmax_of(op, task, begin, begin + of_group, team);
        for (int base = begin; base < begin + of_group; base += lanes) {
          const int count = min(lanes, begin + of_group - base);
          if (team.lane < count) {
            auto place = op.place(task, entry, base + team.lane);
            if constexpr (Op::kSoftmax) place.weight = softmax.weight(place.weight);
            const auto x = sample_axis<R, int32_t>(place.x, R(place.level.width), place.level.width);
            const auto y = sample_axis<R, int32_t>(place.y, R(place.level.height), place.level.height);
            corners[team.lane] = corners_of(place.level, x, y, place.weight);
          }
          team.sync();
          for (int p = 0; has_channels && p < count; ++p) {
            const Corners<R> at = corners[p];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (at.cell[k] < 0) continue;
              R numbers[WIDE];
              load<WIDE>(map + at.cell[k] * op.cell_stride(), numbers);
#pragma unroll
              for (int j = 0; j < WIDE; ++j) sum[j] += at.weight[k] * numbers[j];
            }
          }
          team.sync();
        }
      }
    }
    if (!has_channels) continue;
#pragma unroll
    for (int j = 0; j < WIDE; ++j) sum[j] *= task.scale;
    store<WIDE>(output + index * op.channels + channel, sum);
  }
}

// Products of the output's gradient with a point's four cells, over all channels; with SCATTER the cells'
// gradients, too.
template <int WIDE, bool SCATTER, class Op>
__device__ inline void meet_cells(const Op& op, const Corners<Real<typename Op::Storage>>& at, int64_t map_offset,
                                  const typename Op::Storage* gradient, Real<typename Op::Storage> scale,
                                  Real<typename Op::Storage>* map_gradient, const Team& team,
                                  Real<typename Op::Storage> (&dots)[4]) {
  using R = Real<typename Op::Storage>;
#pragma unroll
  for (int k = 0; k < 4; ++k) dots[k] = 0;
  for (int64_t channel = team.lane * WIDE; channel < op.channels; channel += team.lanes * WIDE) {
    R given[WIDE];
    load<WIDE>(gradient + channel, given);
#pragma unroll
    for (int j = 0; j < WIDE; ++j) given[j] *= scale;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (at.cell[k] < 0) continue;
      const int64_t number = map_offset + at.cell[k] * op.cell_stride() + channel;
      R numbers[WIDE];
      load<WIDE>(op.map + number, numbers);
#pragma unroll
      for (int j = 0; j < WIDE; ++j) dots[k] += given[j] * numbers[j];
      if constexpr (SCATTER) {
        R part[WIDE];
#pragma unroll
        for (int j = 0; j < WIDE; ++j) part[j] = at.weight[k] * given[j];
        add_shared<WIDE>(map_gradient + number, part);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) dots[k] = team.sum(dots[k]);
}

// Gradients of positions and weights, and with SCATTER of the maps.
template <class Op, int WIDE, bool SCATTER>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Op op, const typename Op::Storage* output_gradient, Real<typename Op::Storage>* map_gradient,
                    int lanes) {
  using S = typename Op::Storage;
  using R = Real<S>;
  BEV_SHARED(Corners<R>, shared, kThreads);
  const Team team(lanes);
  const int64_t batch = batch_of_block();
  const uint32_t of_batch = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
  if (batch >= op.batch() || of_batch >= op.tasks) return;  // whole teams: no thread waits for another
  const int64_t index = batch * op.tasks + of_batch;
  Corners<R>* const corners = shared + threadIdx.x - team.lane;
  const auto task = op.open(batch, of_batch);
  const S* const gradient = output_gradient + index * op.channels;
  const int of_group = op.samples / op.groups;
  for (int begin = 0; begin < op.samples; begin += of_group) {
    const auto softmax = softmax_of(op, task, begin, begin + of_group, team);
    R weighted = 0;  // sum of weights times their gradients, of this thread's points
    for (int base = begin; base < begin + of_group; base += lanes) {
      const int count = min(lanes, begin + of_group - base);
      const bool has_point = team.lane < count;
      PointGradient<R> own = {0, 0, 0};
      R weight = 0;
      for (int64_t entry = task.first; entry < task.end; ++entry) {
        Axis<R> x, y;
        if (has_point) {
          auto place = op.place(task, entry, base + team.lane);
          if constexpr (Op::kSoftmax) place.weight = softmax.weight(place.weight);
          weight = place.weight;
          x = sample_axis<R, int32_t>(place.x, R(place.level.width), place.level.width);
          y = sample_axis<R, int32_t>(place.y, R(place.level.height), place.level.height);
          corners[team.lane] = corners_of(place.level, x, y, weight);
        }
        team.sync();
        R mine[4] = {};
        for (int p = 0; p < count; ++p) {
          R dots[4];
          meet_cells<WIDE, SCATTER>(op, corners[p], op.map_offset(task, entry), gradient, task.scale, map_gradient,
                                    team, dots);
#pragma unroll
          for (int k = 0; k < 4; ++k) mine[k] = team.lane == p ? dots[k] : mine[k];
        }
        if (has_point) {
          const auto found = point_gradient<R, int32_t>(x, y, weight, mine[0], mine[1], mine[2], mine[3]);
          own.weight += found.weight, own.x += found.x, own.y += found.y;
          op.add_reference(task, entry, base + team.lane, found);
        }
        team.sync();
      }
      if (has_point) op.write(task, base + team.lane, own);
      weighted += weight * own.weight;
    }
    if constexpr (Op::kSoftmax) {
      // weight * (its gradient - the mean gradient); each thread reads what it wrote itself.
      const R mean = team.sum(weighted);
      for (int p = begin + team.lane; p < begin + of_group; p += lanes) {
        op.set_logit_gradient(task, p, softmax.weight(op.logit(task, p)), mean);
      }
    }
  }
}

// The map's gradient in a fixed order: a warp for each (batch element, head, segment of the queries), which
// alone writes to its part of `segments`.
template <class Op>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_in_order_kernel(Op op, const typename Op::Storage* output_gradient,
                            Real<typename Op::Storage>* segments, uint32_t count, int64_t numbers_of_segment) {
  using S = typename Op::Storage;
  using R = Real<S>;
  BEV_SHARED(Corners<R>, shared, kThreads);
  const Team team(32);
  const int64_t batch = batch_of_block();
  const uint32_t unit = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, heads = op.heads(), parts = count;
  if (batch >= op.batch() || unit >= heads * parts) return;
  const uint32_t segment = unit % parts, head = unit / parts, queries = op.tasks / heads;
  Corners<R>* const corners = shared + threadIdx.x - team.lane;
  R* const target = segments + segment * numbers_of_segment;
  const uint32_t some = queries / parts, more = queries % parts;  // one more for the first `more` segments
  const uint32_t begin = segment * some + min(segment, more), end = begin + some + (segment < more ? 1 : 0);
  for (uint32_t query = begin; query < end; ++query) {
    const int64_t index = batch * op.tasks + query * heads + head;
    const auto task = op.open(batch, query * heads + head);
    const int64_t map_offset = op.map_offset(task, task.first);
    for (int base = 0; base < op.samples; base += 32) {
      const int points = min(32, op.samples - base);
      if (team.lane < points) {
        const auto place = op.place(task, task.first, base + team.lane);
        const auto x = sample_axis<R, int32_t>(place.x, R(place.level.width), place.level.width);
        const auto y = sample_axis<R, int32_t>(place.y, R(place.level.height), place.level.height);
        corners[team.lane] = corners_of(place.level, x, y, place.weight);
      }
      team.sync();
      for (int64_t channel = team.lane; channel < op.channels; channel += 32) {
        const R given = widen(output_gradient[index * op.channels + channel]);
        for (int p = 0; p < points; ++p) {
          for (int k = 0; k < 4; ++k) {
            const int32_t cell = corners[p].cell[k];
            if (cell >= 0) target[map_offset + cell * op.cell_stride() + channel] += corners[p].weight[k] * given;
          }
        }
      }
      team.sync();
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    add_segments_kernel(const R* segments, R* total, int64_t count, int64_t numbers) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= numbers) return;
  R sum = 0;
  for (int64_t segment = 0; segment < count; ++segment) sum += segments[segment * numbers + i];
  total[i] = sum;
}

}  // namespace bevperception::cuda
