// From a problem to a launch: number type, threads of a team, 16 bytes or single numbers.
#pragma once

#include "gather.cuh"

namespace bevperception::cuda {

// Calls body.template operator()<S>(), S the storage type of a number.
template <class Body>
const char* with_number(Number number, const Body& body) {
  switch (number) {
    case Number::kFloat:
      return body(float());
    case Number::kDouble:
      return body(double());
    case Number::kHalf:
      return body(__half());
    default:
      return body(__nv_bfloat16());
  }
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Threads of a task: each WIDE channels, a power of two, at most a warp.
inline int lanes_for(int64_t channels, int wide) {
  int lanes = 1;
  while (lanes < 32 && lanes * wide < channels) lanes *= 2;
  return lanes;
}

constexpr int64_t kMostBlocks = INT32_MAX, kMostRows = 65535;

// Blocks of one batch element's items; batch elements along y and z.
struct Grid {
  int64_t x, y, z;

  Grid(int64_t batch, int64_t items, int64_t of_block)
      : x((items + of_block - 1) / of_block),
        y(batch < kMostRows ? batch : kMostRows),
        z(y > 0 ? (batch + y - 1) / y : 0) {}

  bool is_empty() const { return x == 0 || y == 0; }
  const char* problem() const {
    return x > kMostBlocks || z > kMostRows ? "more work than one launch can hold" : nullptr;
  }
};

inline const char* last_error() {
#if defined(BEV_EMULATOR)
  return nullptr;
#else
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

template <int WIDE, class Op>
const char* launch_forward(const Op& op, typename Op::Storage* output, void* stream) {
  const int lanes = lanes_for(op.channels, WIDE);
  const Grid grid(op.batch(), op.tasks, kThreads / lanes);
  if (grid.is_empty() || op.channels == 0) return nullptr;
  if (const char* problem = grid.problem()) return problem;
  BEV_LAUNCH((forward_kernel<Op, WIDE>), grid, kThreads, stream, op, output, lanes);
  return last_error();
}

template <class Op>
const char* forward(const Op& op, void* output, void* stream) {
  using S = typename Op::Storage;
  S* const target = static_cast<S*>(output);
  const bool wide = op.channels % kWide<S> == 0 && is_aligned(op.map) && is_aligned(output);
  return wide ? launch_forward<kWide<S>>(op, target, stream) : launch_forward<1>(op, target, stream);
}

template <int WIDE, bool SCATTER, class Op>
const char* launch_backward(const Op& op, const typename Op::Storage* output_gradient, void* map_gradient,
                            void* stream) {
  const int lanes = lanes_for(op.channels, WIDE);
  const Grid grid(op.batch(), op.tasks, kThreads / lanes);
  if (grid.is_empty()) return nullptr;
  if (const char* problem = grid.problem()) return problem;
  auto* const target = static_cast<Real<typename Op::Storage>*>(map_gradient);
  BEV_LAUNCH((backward_kernel<Op, WIDE, SCATTER>), grid, kThreads, stream, op, output_gradient, target, lanes);
  return last_error();
}

template <bool SCATTER, class Op>
const char* backward(const Op& op, const void* output_gradient, void* map_gradient, void* stream) {
  using S = typename Op::Storage;
  const S* const given = static_cast<const S*>(output_gradient);
  const bool wide = op.channels % kWide<S> == 0 && is_aligned(op.map) && is_aligned(given) &&
                    (!SCATTER || is_aligned(map_gradient));
  return wide ? launch_backward<kWide<S>, SCATTER>(op, given, map_gradient, stream)
              : launch_backward<1, SCATTER>(op, given, map_gradient, stream);
}

// Backward of the operators that look into one map a row: at once, or the map's part in a fixed order.
template <class Op>
const char* backward_of_maps(const Op& op, const void* output_gradient, const MapGradient& map_gradient,
                             void* stream) {
  using S = typename Op::Storage;
  using R = Real<S>;
  if (map_gradient.segments == nullptr) return backward<true>(op, output_gradient, map_gradient.total, stream);
  if (const char* problem = backward<false>(op, output_gradient, nullptr, stream)) return problem;
  R* const segments = static_cast<R*>(map_gradient.segments);
  const int64_t numbers = op.map_numbers();
  const Grid scatter(op.batch(), int64_t(op.heads()) * map_gradient.count, kThreads / 32), add(1, numbers, kThreads);
  if (scatter.is_empty() || add.is_empty() || op.tasks == 0) return nullptr;
  if (scatter.problem() || add.problem()) return add.problem();
  BEV_LAUNCH((scatter_in_order_kernel<Op>), scatter, kThreads, stream, op, static_cast<const S*>(output_gradient),
             segments, static_cast<uint32_t>(map_gradient.count), numbers);
  BEV_LAUNCH((add_segments_kernel<R>), add, kThreads, stream, segments, static_cast<R*>(map_gradient.total),
             map_gradient.count, numbers);
  return last_error();
}

}  // namespace bevperception::cuda
