// The two attention operators as gather.cuh takes them.
#pragma once

#include "gather.cuh"

namespace bevperception::cuda {

template <class S>
struct MsDeformAttnOp {
  using Storage = S;
  using R = Real<S>;
  static constexpr bool kSoftmax = false;

  MsDeformAttnSizes sizes;
  LevelTable levels;
  const S* map;
  const R *locations, *weights;
  R *locations_gradient, *weights_gradient;
  uint32_t tasks, points;  // of a batch element; of a level
  int64_t channels;
  int samples, groups;

  struct Task {
    int64_t sample, map_offset, first, end;
    R scale;
  };

  explicit MsDeformAttnOp(const MsDeformAttn& problem, void* of_locations = nullptr, void* of_weights = nullptr)
      : sizes(problem.sizes),
        levels(problem.levels),
        map(static_cast<const S*>(problem.value)),
        locations(static_cast<const R*>(problem.locations)),
        weights(static_cast<const R*>(problem.weights)),
        locations_gradient(static_cast<R*>(of_locations)),
        weights_gradient(static_cast<R*>(of_weights)),
        tasks(static_cast<uint32_t>(sizes.queries * sizes.heads)),
        points(static_cast<uint32_t>(sizes.points)),
        channels(sizes.channels),
        samples(static_cast<int>(sizes.levels * sizes.points)),
        groups(1) {}

  __host__ __device__ int64_t batch() const { return sizes.batch; }
  __device__ uint32_t heads() const { return static_cast<uint32_t>(sizes.heads); }
  __host__ __device__ int64_t cell_stride() const { return sizes.heads * sizes.channels; }
  __host__ int64_t map_numbers() const { return sizes.batch * sizes.cells * cell_stride(); }

  __device__ Task open(int64_t batch, uint32_t index) const {
    const int64_t offset = batch * sizes.cells * cell_stride() + index % heads() * sizes.channels;
    return {(batch * tasks + index) * samples, offset, 0, 1, R(1)};
  }
  __device__ int64_t map_offset(const Task& task, int64_t) const { return task.map_offset; }

  __device__ Place<R> place(const Task& task, int64_t, int sample) const {
    const Level& level = levels.at[uint32_t(sample) / points];
    const R* location = locations + 2 * (task.sample + sample);
    return {location_to_position<R>(location[0], R(level.width)),
            location_to_position<R>(location[1], R(level.height)), weights[task.sample + sample], level};
  }

  __device__ void add_reference(const Task&, int64_t, int, const PointGradient<R>&) const {}
  __device__ void write(const Task& task, int sample, const PointGradient<R>& gradient) const {
    const Level& level = levels.at[uint32_t(sample) / points];
    R* location = locations_gradient + 2 * (task.sample + sample);
    location[0] = gradient.x * R(level.width);
    location[1] = gradient.y * R(level.height);
    weights_gradient[task.sample + sample] = gradient.weight;
  }
};

template <class S>
struct DeformAttnOp {
  using Storage = S;
  using R = Real<S>;
  static constexpr bool kSoftmax = true;

  DeformAttn problem;
  const S* map;
  const R *offsets, *logits, *references;
  R *offsets_gradient, *logits_gradient, *references_gradient;
  uint32_t tasks, points;  // of a batch element; of a level
  int64_t channels;
  int samples, groups;

  struct Task {
    int64_t row, head, first, end, batch;
    R scale;
  };

  explicit DeformAttnOp(const DeformAttn& given, void* of_offsets = nullptr, void* of_logits = nullptr,
                        void* of_references = nullptr)
      : problem(given),
        map(static_cast<const S*>(given.value)),
        offsets(static_cast<const R*>(given.offsets)),
        logits(static_cast<const R*>(given.logits)),
        references(static_cast<const R*>(given.references)),
        offsets_gradient(static_cast<R*>(of_offsets)),
        logits_gradient(static_cast<R*>(of_logits)),
        references_gradient(static_cast<R*>(of_references)),
        tasks(static_cast<uint32_t>((given.row_start == nullptr ? given.sizes.queries : given.rows) * given.sizes.heads)),
        points(static_cast<uint32_t>(given.sizes.points)),
        channels(given.sizes.channels),
        samples(static_cast<int>(given.sizes.levels * given.sizes.points)),
        groups(static_cast<int>(given.groups)) {}

  // Compressed rows lie in one batch element, whichever maps they look into.
  __host__ __device__ int64_t batch() const { return problem.row_start == nullptr ? problem.sizes.batch : 1; }
  __host__ __device__ int64_t cell_stride() const { return problem.sizes.heads * problem.sizes.channels; }

  __device__ Task open(int64_t batch, uint32_t index) const {
    const uint32_t heads = static_cast<uint32_t>(problem.sizes.heads);
    const int64_t row = batch * problem.sizes.queries + index / heads;
    Task task{row, index % heads, row, row + 1, batch, R(0)};
    if (problem.row_start != nullptr) {
      // Whatever the rows say, nothing beyond the entries is read.
      task.first = max(problem.row_start[task.row], int64_t(0));
      task.end = min(problem.row_start[task.row + 1], problem.entries);
    }
    if (task.end > task.first) task.scale = R(1) / R((task.end - task.first) * groups);
    return task;
  }
  __device__ int64_t map_offset(const Task& task, int64_t entry) const {
    int64_t of = problem.row_start == nullptr ? task.batch : problem.map_of[entry];
    of = min(max(of, int64_t(0)), problem.sizes.batch - 1);
    return of * problem.sizes.cells * cell_stride() + task.head * channels;
  }

  __device__ R logit(const Task& task, int sample) const {
    return logits[task.row * problem.logits_stride + task.head * samples + sample];
  }
  __device__ Place<R> place(const Task& task, int64_t entry, int sample) const {
    const Level& level = problem.levels.at[uint32_t(sample) / points];
    const R* reference = references + 2 * (entry * problem.anchors + problem.anchor_of[sample]);
    const R* offset = offsets + task.row * problem.offsets_stride + 2 * (task.head * samples + sample);
    return {offset[0] + location_to_position<R>(reference[0], R(level.width)),
            offset[1] + location_to_position<R>(reference[1], R(level.height)), logit(task, sample), level};
  }

  __device__ void add_reference(const Task&, int64_t entry, int sample, const PointGradient<R>& gradient) const {
    if (references_gradient == nullptr) return;
    const Level& level = problem.levels.at[uint32_t(sample) / points];
    R* reference = references_gradient + 2 * (entry * problem.anchors + problem.anchor_of[sample]);
    atomicAdd(reference, gradient.x * R(level.width));
    atomicAdd(reference + 1, gradient.y * R(level.height));
  }
  // Gradients are contiguous, whatever their tensors' strides.
  __device__ void write(const Task& task, int sample, const PointGradient<R>& gradient) const {
    const int64_t place = (task.row * problem.sizes.heads + task.head) * samples + sample;
    offsets_gradient[2 * place] = gradient.x;
    offsets_gradient[2 * place + 1] = gradient.y;
    logits_gradient[place] = gradient.weight;
  }
  __device__ void set_logit_gradient(const Task& task, int sample, R weight, R mean) const {
    R* gradient = logits_gradient + (task.row * problem.sizes.heads + task.head) * samples + sample;
    *gradient = weight * (*gradient - mean);
  }
};

}  // namespace bevperception::cuda
