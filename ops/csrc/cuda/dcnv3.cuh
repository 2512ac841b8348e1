// Deformable convolution v3 as gather.cuh takes it: groups are the heads, output cells the queries.
#pragma once

#include "gather.cuh"

namespace bevperception::cuda {

template <class S>
struct Dcnv3Op {
  using Storage = S;
  using R = Real<S>;
  static constexpr bool kSoftmax = false;

  Dcnv3Sizes sizes;
  R offset_scale;
  const S* map;
  const R *offset, *mask;
  R *offset_gradient, *mask_gradient;
  uint32_t tasks;  // of a batch element
  int64_t channels;
  int samples, groups;  // of a softmax: one

  struct Task {
    int64_t sample, map_offset, first, end;
    R centre_x, centre_y, scale;
  };

  explicit Dcnv3Op(const Dcnv3& problem, void* of_offset = nullptr, void* of_mask = nullptr)
      : sizes(problem.sizes),
        offset_scale(static_cast<R>(problem.offset_scale)),
        map(static_cast<const S*>(problem.input)),
        offset(static_cast<const R*>(problem.offset)),
        mask(static_cast<const R*>(problem.mask)),
        offset_gradient(static_cast<R*>(of_offset)),
        mask_gradient(static_cast<R*>(of_mask)),
        tasks(static_cast<uint32_t>(sizes.out_height * sizes.out_width * sizes.groups)),
        channels(sizes.channels),
        samples(sizes.points()),
        groups(1) {}

  __host__ __device__ int64_t batch() const { return sizes.batch; }
  __device__ uint32_t heads() const { return static_cast<uint32_t>(sizes.groups); }
  __host__ __device__ int64_t cell_stride() const { return sizes.groups * sizes.channels; }
  __host__ int64_t map_numbers() const { return sizes.batch * sizes.height * sizes.width * cell_stride(); }

  __device__ Task open(int64_t batch, uint32_t index) const {
    const uint32_t cell = index / heads(), group = index % heads(), width = static_cast<uint32_t>(sizes.out_width);
    return {(batch * tasks + index) * samples,
            batch * sizes.height * sizes.width * cell_stride() + group * sizes.channels,
            0,
            1,
            R(kernel_centre(sizes, cell % width)),
            R(kernel_centre(sizes, cell / width)),
            R(1)};
  }
  __device__ int64_t map_offset(const Task& task, int64_t) const { return task.map_offset; }

  __device__ Place<R> place(const Task& task, int64_t, int sample) const {
    const Tap tap = kernel_tap(sizes, sample);
    const R* moved = offset + 2 * (task.sample + sample);
    return {tap_position<R>(task.centre_x, R(tap.x), moved[0], offset_scale),
            tap_position<R>(task.centre_y, R(tap.y), moved[1], offset_scale), mask[task.sample + sample],
            Level{static_cast<int32_t>(sizes.height), static_cast<int32_t>(sizes.width), 0}};
  }

  __device__ void add_reference(const Task&, int64_t, int, const PointGradient<R>&) const {}
  __device__ void write(const Task& task, int sample, const PointGradient<R>& gradient) const {
    R* moved = offset_gradient + 2 * (task.sample + sample);
    moved[0] = gradient.x * offset_scale;
    moved[1] = gradient.y * offset_scale;
    mask_gradient[task.sample + sample] = gradient.weight;
  }
};

}  // namespace bevperception::cuda
