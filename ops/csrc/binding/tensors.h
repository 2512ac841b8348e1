// What the bindings of all operators need: tensors in and out of pointers, and sharing out work.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/memory.h"

namespace bevperception {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Bytes from which asking for huge pages pays.
constexpr int64_t kHugePageBytes = 4 << 20;

// Allocations from this size on are fresh pages: glibc's largest threshold for mapping them. Not so in a process
// that keeps what it frees (bevperception/malloc.py).
constexpr int64_t kFreshBytes = 32 << 20;

// An uninitialised result, on huge pages if it is large.
inline Tensor empty_result(const Tensor& like, const std::vector<int64_t>& shape) {
  Tensor result = torch::stable::new_empty(like, shape);
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes >= kHugePageBytes) cpu::advise_huge_pages(result.data_ptr(), bytes);
  return result;
}

inline Tensor empty_result_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return empty_result(like, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

// For results of nothing: where a size is zero no kernel writes, or each writes a part.
inline Tensor zero_result(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_zeros(like, shape);
}

inline void require_same_dtype(const char* op, std::initializer_list<const Tensor*> tensors) {
  const ScalarType dtype = (*tensors.begin())->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": the native CPU kernels take float32 or float64; bevperception.ops casts other dtypes");
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, op, ": all tensors must have one dtype");
  }
}

inline void require_shape(const char* op, const char* name, const Tensor& tensor,
                          std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), op, ": ",
                  name, " has a shape that does not fit the other arguments");
}

// Calls body.template operator()<T>() for the tensor's dtype.
template <class Body>
auto with_dtype(const Tensor& tensor, const Body& body) {
  return tensor.scalar_type() == ScalarType::Float ? body(float()) : body(double());
}

// Runs body(begin, end) over parts of 0 to count on all threads. A thread takes the next part when it
// is done with one, so that a thread that other programs hold up does not hold up the rest.
// work_of_one: multiply-adds of one item, about.
template <class Body>
void share_out(int64_t count, int64_t work_of_one, const Body& body) {
  constexpr int64_t kWork = 1 << 16;  // of a part, so that taking it costs little against it
  constexpr int64_t kPartsOfThread = 16;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t part = std::max({int64_t(1), kWork / std::max<int64_t>(1, work_of_one),
                                 count / (threads * kPartsOfThread)});
  const int64_t parts = (count + part - 1) / part;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, parts), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = part * next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(begin, std::min(begin + part, count));
    }
  });
}

// Writes zeros, on all threads.
inline void clear(char* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20, kWork = 1 << 16;
  share_out((bytes + kPiece - 1) / kPiece, kWork, [&](int64_t begin, int64_t end) {
    std::memset(data + begin * kPiece, 0, static_cast<size_t>(std::min(bytes, end * kPiece) - begin * kPiece));
  });
}

// True if a large fresh result now holds zeros. If not, its parts are to be cleared as they are used.
inline bool cleared_cheaply(const Tensor& result) {
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes < kFreshBytes) return false;
  char* data = static_cast<char*>(result.data_ptr());
  if (cpu::mostly_touched(data, bytes)) {
    clear(data, bytes);
    return true;
  }
  const cpu::MemoryRange zero = cpu::drop_to_zero(data, bytes);
  if (zero.begin == zero.end) return false;
  std::memset(data, 0, static_cast<size_t>(zero.begin - data));
  std::memset(zero.end, 0, static_cast<size_t>(data + bytes - zero.end));
  return true;
}

// Runs body(share) for shares that cover all heads of all batch elements of a map's gradient. A share
// holds as many heads as can be while all threads have the same to do: neighbouring heads share pages
// and cache sets.
template <class Body>
void for_map_shares(const Tensor& map_gradient, int64_t heads, int64_t work_of_head, const Body& body) {
  const bool is_zero = cleared_cheaply(map_gradient);
  const int64_t batch = map_gradient.size(0);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t parts = 1;  // of a batch element
  while (parts < heads && batch * parts % threads != 0 && batch * parts < 8 * threads) ++parts;
  share_out(batch * parts, work_of_head * heads / parts, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t part = share % parts;
      body(cpu::MapShare{share / parts, part * heads / parts, (part + 1) * heads / parts, is_zero});
    }
  });
}

}  // namespace bevperception
