// What all kernels need: number types, loads of 16 bytes, additions that others may do at the same time.
// nvcc compiles this for GPUs. Tests build the very same kernels for the CPU, where another header, included first,
// stands for CUDA and defines the two macros below.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/host_device.h"

#if !defined(BEV_SHARED)
#define BEV_SHARED(type, name, count) __shared__ type name[count]
#define BEV_LAUNCH(kernel, grid, threads, stream, ...)                                                    \
  kernel<<<dim3(static_cast<unsigned>((grid).x), static_cast<unsigned>((grid).y),                         \
                static_cast<unsigned>((grid).z)),                                                         \
           dim3(threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace bevperception::cuda {

// Sums are made in float, of doubles in double.
template <class S>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class S>
using Real = typename RealOf<S>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S>
__device__ inline S narrow(Real<S> x) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// The type that is moved by one instruction.
template <int BYTES>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

// Numbers of 16 bytes, or single ones where memory or channels do not allow that.
template <class S>
constexpr int kWide = 16 / static_cast<int>(sizeof(S));

template <int N, class S>
__device__ inline void load(const S* from, Real<S> (&to)[N]) {
  using W = typename Word<N * static_cast<int>(sizeof(S))>::type;
  const W word = *reinterpret_cast<const W*>(from);
  S numbers[N];
  memcpy(static_cast<void*>(numbers), &word, sizeof word);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = widen(numbers[k]);
}

template <int N, class S>
__device__ inline void store(S* to, const Real<S> (&from)[N]) {
  using W = typename Word<N * static_cast<int>(sizeof(S))>::type;
  S numbers[N];
#pragma unroll
  for (int k = 0; k < N; ++k) numbers[k] = narrow<S>(from[k]);
  W word;
  memcpy(&word, numbers, sizeof word);
  *reinterpret_cast<W*>(to) = word;
}

// to[0..N) += from, while other threads may do the same.
template <int N, class R>
__device__ inline void add_shared(R* to, const R (&from)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFours = std::is_same_v<R, float> && N % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + k), make_float4(from[k], from[k + 1], from[k + 2], from[k + 3]));
    }
#endif
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) atomicAdd(to + k, from[k]);
  }
}

// Threads that work on one task together: a power of two of neighbours within a warp.
struct Team {
  int lanes, lane;
  unsigned mask;  // of the warp's threads

  __device__ explicit Team(int count)
      : lanes(count),
        lane(static_cast<int>(threadIdx.x) % count),
        mask((count == 32 ? ~0u : (1u << count) - 1u) << (threadIdx.x % 32 - static_cast<unsigned>(lane))) {}

  __device__ void sync() const { __syncwarp(mask); }

  template <class R>
  __device__ R sum(R x) const {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
    return x;
  }
  template <class R>
  __device__ R largest(R x) const {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const R other = __shfl_xor_sync(mask, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

}  // namespace bevperception::cuda
