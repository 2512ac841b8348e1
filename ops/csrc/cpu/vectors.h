// Fixed-width vectors, as the compiler's vector extension (g++ 12 or clang 15, or newer).
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

// Elements of the widest vector of T.
template <class T>
constexpr int kWidth = BEV_VECTOR_BYTES / sizeof(T);

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

template <class V>
struct Pair {
  V first, second;
};

// (a0 b0 a1 b1 ...), in two vectors.
template <int N, class V>
BEV_INLINE Pair<V> interleave(const V& a, const V& b) {
  static_assert(N == 2 || N == 4 || N == 8 || N == 16);
  if constexpr (N == 2) {
    return {__builtin_shufflevector(a, b, 0, 2), __builtin_shufflevector(a, b, 1, 3)};
  } else if constexpr (N == 4) {
    return {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
  } else if constexpr (N == 8) {
    return {__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
            __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
  } else {
    return {__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  }
}

// The even and the odd elements of two vectors in a row.
template <int N, class V>
BEV_INLINE Pair<V> deinterleave(const V& a, const V& b) {
  static_assert(N == 2 || N == 4 || N == 8 || N == 16);
  if constexpr (N == 2) {
    return {__builtin_shufflevector(a, b, 0, 2), __builtin_shufflevector(a, b, 1, 3)};
  } else if constexpr (N == 4) {
    return {__builtin_shufflevector(a, b, 0, 2, 4, 6), __builtin_shufflevector(a, b, 1, 3, 5, 7)};
  } else if constexpr (N == 8) {
    return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14),
            __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)};
  } else {
    return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
  }
}

// N pairs (x, y) in a row.
template <int N, class T>
BEV_INLINE Pair<Vector<T, N>> load_pairs(const T* from) {
  if constexpr (N == 1) {
    return {from[0], from[1]};
  } else {
    return deinterleave<N>(load<N>(from), load<N>(from + N));
  }
}

template <int N, class T>
BEV_INLINE void store_pairs(T* to, const Vector<T, N>& x, const Vector<T, N>& y) {
  if constexpr (N == 1) {
    to[0] = x, to[1] = y;
  } else {
    const Pair<Vector<T, N>> pairs = interleave<N>(x, y);
    store<N>(to, pairs.first);
    store<N>(to + N, pairs.second);
  }
}

// N quadruples in a row.
template <int N, class T>
BEV_INLINE void load_quads(const T* from, Vector<T, N> (&quad)[4]) {
  if constexpr (N == 1) {
    for (int k = 0; k < 4; ++k) quad[k] = from[k];
  } else {
    const auto left = deinterleave<N>(load<N>(from), load<N>(from + N));
    const auto right = deinterleave<N>(load<N>(from + 2 * N), load<N>(from + 3 * N));
    const auto even = deinterleave<N>(left.first, right.first);
    const auto odd = deinterleave<N>(left.second, right.second);
    quad[0] = even.first, quad[1] = odd.first, quad[2] = even.second, quad[3] = odd.second;
  }
}

template <int N, class T>
BEV_INLINE void store_quads(T* to, const Vector<T, N>& a, const Vector<T, N>& b, const Vector<T, N>& c,
                            const Vector<T, N>& d) {
  if constexpr (N == 1) {
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
  } else {
    const auto ac = interleave<N>(a, c), bd = interleave<N>(b, d);
    store_pairs<N>(to, ac.first, bd.first);
    store_pairs<N>(to + 2 * N, ac.second, bd.second);
  }
}

template <int N, class T>
BEV_INLINE Vector<T, N / 2> sum_of_halves(const Vector<T, N>& v) {
  static_assert(N == 8 || N == 16);
  if constexpr (N == 8) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// Sums of the elements of four vectors, together: the last steps are shared.
template <int N, class T>
BEV_INLINE void four_sums(const Vector<T, N>& a, const Vector<T, N>& b, const Vector<T, N>& c,
                          const Vector<T, N>& d, T (&sums)[4]) {
  if constexpr (N > 4) {
    four_sums<N / 2, T>(sum_of_halves<N, T>(a), sum_of_halves<N, T>(b), sum_of_halves<N, T>(c),
                        sum_of_halves<N, T>(d), sums);
  } else if constexpr (N == 4) {
    const auto ab = interleave<4>(a, b), cd = interleave<4>(c, d);
    const Vector<T, 4> left = ab.first + ab.second, right = cd.first + cd.second;  // (a b a b), (c d c d)
    const Vector<T, 4> all = __builtin_shufflevector(left, right, 0, 1, 4, 5) +
                             __builtin_shufflevector(left, right, 2, 3, 6, 7);
    __builtin_memcpy(sums, &all, sizeof all);
  } else if constexpr (N == 2) {
    sums[0] = a[0] + a[1], sums[1] = b[0] + b[1], sums[2] = c[0] + c[1], sums[3] = d[0] + d[1];
  } else {
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
  }
}

// Calls body.template run<N>(i) for blocks of N elements that cover 0 to count, widest first.
template <class T, class Body>
BEV_INLINE void for_blocks(int64_t count, const Body& body) {
  constexpr int kFull = kWidth<T>;
  int64_t i = 0;
  for (; count - i >= kFull; i += kFull) body.template run<kFull>(i);
  if constexpr (kFull > 4) {
    for (; count - i >= 4; i += 4) body.template run<4>(i);
  }
  for (; i < count; ++i) body.template run<1>(i);
}

}  // namespace
}  // namespace bevperception::cpu
