// Scratch memory of a task, and huge pages for large results.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bevperception::cpu {
namespace {

// Uninitialised memory, aligned to a cache line.
class AlignedMemory {
 public:
  explicit AlignedMemory(int64_t bytes) {
    if (posix_memalign(&data_, 64, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) abort();
  }
  ~AlignedMemory() { free(data_); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Asks Linux to back a fresh allocation with 2 MB pages, which makes touching it first several times
// faster; a hint only, without effect on small allocations, elsewhere, or where it is switched off.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace
}  // namespace bevperception::cpu
