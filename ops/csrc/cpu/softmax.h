// Softmax over short runs of numbers.
#pragma once

#include <math.h>

#include "vectors.h"

namespace bevperception::cpu {
namespace {

// e^x for x <= 0, within two units in the last place; below -87 about 1e-38. NaN stays NaN.
template <int N>
BEV_INLINE Vector<float, N> exp_of_negative(const Vector<float, N>& x) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  const F lowest = broadcast<N>(-87.0f);
  const F safe = x < lowest ? lowest : x, finite = x > lowest ? x : lowest;  // they differ for NaN
  const I power = convert<I>(finite * 1.44269504f - 0.5f);  // of two, rounded
  const F n = convert<F>(power);
  const F r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  F sum = broadcast<N>(1.9875691500e-4f);
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  const I bits = (power + 127) << 23;
  F scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

template <int N>
BEV_INLINE Vector<double, N> exp_of_negative(const Vector<double, N>& x) {
  if constexpr (N == 1) {
    return exp(x);
  } else {
    Vector<double, N> result;
    for (int k = 0; k < N; ++k) result[k] = exp(x[k]);
    return result;
  }
}

template <class T>
struct ExpInPlace {
  T* numbers;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    store<N>(numbers + i, exp_of_negative<N>(load<N>(numbers + i)));
  }
};

// weights = softmax of each run of `length` logits, times `scale`.
template <class T>
BEV_INLINE void softmax_runs(const T* logits, int64_t runs, int64_t length, T scale, T* __restrict weights) {
  for (int64_t run = 0; run < runs; ++run) {
    const T* of_run = logits + run * length;
    T largest = of_run[0];
    for (int64_t i = 1; i < length; ++i) largest = of_run[i] > largest ? of_run[i] : largest;
    for (int64_t i = 0; i < length; ++i) weights[run * length + i] = of_run[i] - largest;
  }
  for_blocks<T>(runs * length, ExpInPlace<T>{weights});
  for (int64_t run = 0; run < runs; ++run) {
    T* of_run = weights + run * length;
    T sum = 0;
    for (int64_t i = 0; i < length; ++i) sum += of_run[i];
    const T factor = scale / sum;
    for (int64_t i = 0; i < length; ++i) of_run[i] *= factor;
  }
}

}  // namespace
}  // namespace bevperception::cpu
