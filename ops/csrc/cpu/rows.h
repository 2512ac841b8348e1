// Layer norm and softmax of rows, for prediction: PyTorch's own are slow on rows of few numbers.
#pragma once

#include <math.h>

#include <type_traits>

#include "kernels.h"
#include "softmax.h"

namespace bevperception::cpu {
namespace {

// N numbers as T, which they may be stored shorter than.
template <int N, class T, class Stored>
BEV_INLINE Vector<T, N> load_as(const Stored* from) {
  if constexpr (std::is_same_v<Stored, T>) {
    return load<N>(from);
  } else {
    static_assert(std::is_same_v<Stored, Bfloat16> && std::is_same_v<T, float>);
    const auto bits = convert<Vector<uint32_t, N>>(load<N>(&from->bits)) << 16;
    Vector<T, N> numbers;
    __builtin_memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
  }
}

// Bfloat16 is rounded to the nearest, ties to even.
template <int N, class T, class Stored>
BEV_INLINE void store_as(Stored* to, const Vector<T, N>& numbers) {
  if constexpr (std::is_same_v<Stored, T>) {
    store<N>(to, numbers);
  } else {
    static_assert(std::is_same_v<Stored, Bfloat16> && std::is_same_v<T, float>);
    using U = Vector<uint32_t, N>;
    U bits;
    __builtin_memcpy(&bits, &numbers, sizeof bits);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;  // rounding could make an infinity of NaN
    const U chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    store<N>(&to->bits, convert<Vector<uint16_t, N>>(chosen));
  }
}

template <int N, class T>
BEV_INLINE T sum_of(const Vector<T, N>& v) {
  if constexpr (N > 4) {
    return sum_of<N / 2, T>(sum_of_halves<N, T>(v));
  } else if constexpr (N == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    return v;
  }
}

// A sum over the blocks that for_blocks makes.
template <class T>
class BlockSum {
 public:
  template <int N>
  BEV_INLINE void add(const Vector<T, N>& v) {
    if constexpr (N == kWidth<T>) {
      wide_ += v;
    } else if constexpr (N == 4) {
      four_ += v;
    } else {
      one_ += v;
    }
  }
  BEV_INLINE T total() const { return sum_of<kWidth<T>, T>(wide_) + sum_of<4, T>(four_) + one_; }

 private:
  Vector<T, kWidth<T>> wide_{};
  Vector<T, 4> four_{};
  T one_ = 0;
};

template <class Stored, class T>
struct AddRow {
  const Stored* row;
  BlockSum<T>& sum;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    sum.template add<N>(load_as<N, T>(row + i));
  }
};

template <class Stored, class T>
struct AddSquares {
  const Stored* row;
  T mean;
  BlockSum<T>& sum;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const Vector<T, N> deviation = load_as<N, T>(row + i) - mean;
    sum.template add<N>(deviation * deviation);
  }
};

template <class Stored, class T>
struct WriteNormal {
  const LayerNorm<Stored, T>& problem;
  const Stored* row;
  T mean, factor;
  Stored* output;

  template <int N>
  BEV_INLINE void run(int64_t i) const {
    const Vector<T, N> scale = load<N>(problem.weight + i) * factor;
    const Vector<T, N> normal = (load_as<N, T>(row + i) - mean) * scale + load<N>(problem.bias + i);
    store_as<N, T>(output + i, normal);
  }
};

template <class Stored, class T>
void layer_norm(const LayerNorm<Stored, T>& problem, Stored* output, int64_t begin, int64_t end) {
  const int64_t channels = problem.channels;
  const T share = T(1) / static_cast<T>(channels);
  for (int64_t r = begin; r < end; ++r) {
    const Stored* row = problem.input + r * channels;
    BlockSum<T> sum, squares;
    for_blocks<T>(channels, AddRow<Stored, T>{row, sum});
    const T mean = sum.total() * share;
    for_blocks<T>(channels, AddSquares<Stored, T>{row, mean, squares});
    const T factor = T(1) / static_cast<T>(sqrt(squares.total() * share + problem.epsilon));
    for_blocks<T>(channels, WriteNormal<Stored, T>{problem, row, mean, factor, output + r * channels});
  }
}

template <class T>
void softmax(const T* logits, T* weights, int64_t length, int64_t begin, int64_t end) {
  softmax_runs<T>(logits + begin * length, end - begin, length, T(1), weights + begin * length);
}

}  // namespace
}  // namespace bevperception::cpu
