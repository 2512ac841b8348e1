// Functions marked BEV_HD run on the CPU and, compiled by nvcc, also on the GPU.
//
// They are templates over a number type F: float, double, or on the CPU a vector of them that holds
// one sampling point an element. Comparisons of vectors give masks; `mask ? a : b`, `&` and
// arithmetic mean the same for numbers and vectors, so one body serves all.
#pragma once

#include <stdint.h>

#include <type_traits>

#if defined(__CUDACC__)
#define BEV_HD __host__ __device__ inline __attribute__((always_inline))
#else
#define BEV_HD inline __attribute__((always_inline))
#endif

namespace bevperception {

// A whole number, as F.
template <class F, int VALUE>
BEV_HD F constant() {
  return F{} + VALUE;
}

// Element-wise conversion; numbers become whole ones by cutting toward zero.
template <class To, class From>
BEV_HD To convert(From from) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic_v<From>) {
    return __builtin_convertvector(from, To);
  } else
#endif
  {
    return static_cast<To>(from);
  }
}

}  // namespace bevperception
