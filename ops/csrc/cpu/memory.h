// Scratch memory of a task, and huge pages for large results.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bevperception::cpu {
namespace {

// A map larger than this exceeds the caches near a core: its cells are worth asking for ahead of their use, and
// worth visiting in an order that finds them still there. On smaller ones both cost more than they bring.
constexpr int64_t kLargeMapBytes = int64_t(4) << 20;

// Uninitialised memory, aligned to a cache line.
class AlignedMemory {
 public:
  explicit AlignedMemory(int64_t bytes) {
    if (posix_memalign(&data_, 64, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) throw std::bad_alloc();
  }
  ~AlignedMemory() { free(data_); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Uninitialised memory that its thread keeps for the next who asks, up to a limit: fresh memory has to be cleared
// by the system before it can be touched. One at a time in a thread.
class KeptMemory {
 public:
  static constexpr int64_t kLimit = int64_t(8) << 20;  // bytes; more is given back

  explicit KeptMemory(int64_t bytes);
  void* data() const { return own_ ? own_->data() : kept().memory->data(); }

 private:
  struct Kept {
    std::unique_ptr<AlignedMemory> memory;
    int64_t bytes = 0;
  };
  static Kept& kept() {
    static thread_local Kept memory;
    return memory;
  }

  std::unique_ptr<AlignedMemory> own_;
};

// A range of memory to ask the cache for ahead of its use, a few lines at a time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* begin, const void* end)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {}

  void ask(int64_t lines) {
    constexpr int64_t kLine = 64;
    for (; lines > 0 && next_ < end_; --lines, next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char* next_ = nullptr;
  const char* end_ = nullptr;
};

struct MemoryRange {
  char* begin;
  char* end;
};

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// The part of a memory range that consists of whole 2 MB pages.
inline MemoryRange huge_pages_within(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  return {reinterpret_cast<char*>(begin), reinterpret_cast<char*>(end > begin ? end : begin)};
}
#endif

// Asks Linux to back a fresh allocation with 2 MB pages, which makes touching it first several times
// faster; a hint only, without effect on small allocations, elsewhere, or where it is switched off.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const MemoryRange pages = huge_pages_within(data, bytes);
  if (pages.end > pages.begin) madvise(pages.begin, static_cast<size_t>(pages.end - pages.begin), MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

inline KeptMemory::KeptMemory(int64_t bytes) {
  Kept& memory = kept();
  if (bytes <= memory.bytes) return;
  auto fresh = std::make_unique<AlignedMemory>(bytes);
  advise_huge_pages(fresh->data(), bytes);
  if (bytes > kLimit) {
    own_ = std::move(fresh);
  } else {
    memory.memory = std::move(fresh);
    memory.bytes = bytes;
  }
}

// Whether most of a memory range has been touched since it was mapped, as has what a program freed and got again.
inline bool mostly_touched(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const MemoryRange pages = huge_pages_within(data, bytes);
  const int64_t count = (pages.end - pages.begin) / sysconf(_SC_PAGESIZE);
  const AlignedMemory memory(count);
  unsigned char* const answers = static_cast<unsigned char*>(memory.data());
  if (count == 0 || mincore(pages.begin, static_cast<size_t>(pages.end - pages.begin), answers) != 0) return false;
  int64_t touched = 0;
  for (int64_t k = 0; k < count; ++k) touched += answers[k] & 1;
  return 2 * touched > count;
#else
  (void)data;
  (void)bytes;
  return false;
#endif
}

// Makes Linux hand out zeros when a large fresh allocation is first touched, which saves writing them.
// Returns the part that is zero now: none where that cannot be had, which marks that have to disappear
// tell (memory that is shared or backed by a file keeps them). On memory in use it would be slow.
inline MemoryRange drop_to_zero(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const MemoryRange pages = huge_pages_within(data, bytes);
  const size_t size = static_cast<size_t>(pages.end - pages.begin);
  if (size > 0) {
    volatile char* const marks[] = {pages.begin, pages.end - 1};
    for (volatile char* mark : marks) *mark = 1;
    if (madvise(pages.begin, size, MADV_DONTNEED) == 0 && *marks[0] == 0 && *marks[1] == 0) {
      return {pages.begin, pages.end};
    }
  }
#endif
  return {static_cast<char*>(data), static_cast<char*>(data)};
}

}  // namespace
}  // namespace bevperception::cpu
