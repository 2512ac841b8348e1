// Fixed-width vectors for the channel loops, as the compiler's vector extension.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__)
#define BEV_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BEV_VECTOR_BYTES 32
#else
#define BEV_VECTOR_BYTES 16
#endif

#define BEV_INLINE inline __attribute__((always_inline))

namespace bevperception::cpu {
namespace {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct VectorOf<T, 1> {
  typedef T type;
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <int N, class T>
BEV_INLINE Vector<T, N> load(const T* from) {
  Vector<T, N> vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <int N, class T>
BEV_INLINE void store(T* to, const Vector<T, N>& vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

template <int N, class T>
BEV_INLINE Vector<T, N> broadcast(T scalar) {
  if constexpr (N == 1) {
    return scalar;
  } else {
    return scalar - Vector<T, N>{};
  }
}

template <class T>
struct FourSums {
  T sum[4];
};

#define BEV_HALF_OF_8(v, s) __builtin_shufflevector(v, v, s, s + 1, s + 2, s + 3)
#define BEV_HALF_OF_16(v, s) \
  __builtin_shufflevector(v, v, s, s + 1, s + 2, s + 3, s + 4, s + 5, s + 6, s + 7)

// Sums of the elements of four vectors, together: the last steps are shared.
template <int N, class T>
BEV_INLINE FourSums<T> four_sums(Vector<T, N> a, Vector<T, N> b, Vector<T, N> c, Vector<T, N> d) {
  if constexpr (N == 16) {
    return four_sums<8, T>(BEV_HALF_OF_16(a, 0) + BEV_HALF_OF_16(a, 8), BEV_HALF_OF_16(b, 0) + BEV_HALF_OF_16(b, 8),
                           BEV_HALF_OF_16(c, 0) + BEV_HALF_OF_16(c, 8), BEV_HALF_OF_16(d, 0) + BEV_HALF_OF_16(d, 8));
  } else if constexpr (N == 8) {
    return four_sums<4, T>(BEV_HALF_OF_8(a, 0) + BEV_HALF_OF_8(a, 4), BEV_HALF_OF_8(b, 0) + BEV_HALF_OF_8(b, 4),
                           BEV_HALF_OF_8(c, 0) + BEV_HALF_OF_8(c, 4), BEV_HALF_OF_8(d, 0) + BEV_HALF_OF_8(d, 4));
  } else if constexpr (N == 4) {
    // ab = (a0 + a2, b0 + b2, a1 + a3, b1 + b3), cd likewise
    const Vector<T, 4> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vector<T, 4> cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Vector<T, 4> sums = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    FourSums<T> result;
    __builtin_memcpy(result.sum, &sums, sizeof sums);
    return result;
  } else if constexpr (N == 2) {
    return {a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
  } else {
    return {a, b, c, d};
  }
}

}  // namespace
}  // namespace bevperception::cpu
