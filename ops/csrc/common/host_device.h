// Functions marked BEV_HD run on the CPU and, compiled by nvcc, also on the GPU.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define BEV_HD __host__ __device__ inline __attribute__((always_inline))
#else
#define BEV_HD inline __attribute__((always_inline))
#endif

namespace bevperception {

BEV_HD float floor_of(float x) { return ::floorf(x); }
BEV_HD double floor_of(double x) { return ::floor(x); }

}  // namespace bevperception
