// Runs CUDA kernels on the CPU, to test their logic where there is no GPU: every thread of a block is a fiber,
// one block runs after the other. What it shows: wrong indices, reads and writes elsewhere (with sanitizers),
// missing or divergent synchronisation (in several orders of threads; shared memory holds NaN at first). What
// it cannot show: races between blocks, the limits of a launch, speed.
//
// A kernel source is compiled by a C++ compiler with -DBEV_EMULATOR; only what this project's kernels use is
// here: one-dimensional blocks, warps that synchronise and exchange, atomic additions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

#define BEV_SHARED(type, name, count)                                 \
  static type name[count];                                            \
  ::bevperception::emulator::Block::current().share(name, sizeof name)
#define BEV_LAUNCH(kernel, grid, threads, stream, ...)                          \
  ::bevperception::emulator::launch((grid).x, (grid).y, (grid).z, threads, [&] { kernel(__VA_ARGS__); }), (void)(stream)

namespace bevperception::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// In which order the threads of a block get their turns.
enum class Order { kForward, kBackward, kShuffled };
inline Order& order() {
  static Order value = Order::kForward;
  return value;
}

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  // Runs body once for each thread.
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    shared_.clear();
    fibers_.clear();
    fibers_.resize(threads);
    for (unsigned k = 0; k < threads; ++k) start(k);
    std::vector<unsigned> turns(threads);
    for (unsigned k = 0; k < threads; ++k) turns[k] = order() == Order::kBackward ? threads - 1 - k : k;
    unsigned left = threads;
    while (left > 0) {
      if (order() == Order::kShuffled) shuffle(turns);
      bool moved = false;
      for (const unsigned k : turns) {
        Fiber& fiber = fibers_[k];
        if (fiber.done || (fiber.waiting && !arrived(k))) continue;
        moved = true;
        running_ = k;
        swapcontext(&scheduler_, &fiber.context);
        left -= fiber.done;
      }
      if (!moved) fail("threads wait for others that never come: divergent synchronisation");
    }
  }

  unsigned thread() const { return running_; }

  // A thread waits here until all threads of its warp that `mask` names are here as often as it is.
  void sync(unsigned mask) {
    Fiber& fiber = fibers_[running_];
    if (!(mask >> running_ % 32 & 1)) fail("a thread synchronises with a mask that leaves it out");
    fiber.mask = mask;
    ++fiber.visits;
    fiber.waiting = true;
    swapcontext(&fiber.context, &scheduler_);
    fiber.waiting = false;
  }

  template <class T>
  T exchange(unsigned mask, T value, unsigned from_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Fiber& fiber = fibers_[running_];
    memcpy(&fiber.slot, &value, sizeof value);
    sync(mask);
    if (!(mask >> from_lane & 1)) fail("a thread reads from one that its mask leaves out");
    T result;
    memcpy(&result, &fibers_[running_ / 32 * 32 + from_lane].slot, sizeof result);
    sync(mask);  // nobody writes before all have read
    return result;
  }

  // Shared memory of a block holds nothing of use at first.
  void share(void* memory, size_t bytes) {
    if (std::find(shared_.begin(), shared_.end(), memory) != shared_.end()) return;
    shared_.push_back(memory);
    memset(memory, 0xff, bytes);
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned mask = 0;
    uint64_t visits = 0, slot = 0;
    bool waiting = false, done = false;
  };

  void start(unsigned k) {
    Fiber& fiber = fibers_[k];
    fiber.stack.resize(64 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
  }

  static void enter() {
    Block& block = current();
    (*block.body_)();
    block.fibers_[block.running_].done = true;
  }

  bool arrived(unsigned k) const {
    const Fiber& fiber = fibers_[k];
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      const unsigned other = k / 32 * 32 + lane;
      if (other >= fibers_.size() || fibers_[other].visits < fiber.visits) return false;
      if (fibers_[other].mask != fiber.mask) fail("threads synchronise with different masks");
    }
    return true;
  }

  void shuffle(std::vector<unsigned>& turns) {
    for (size_t k = turns.size(); k > 1; --k) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      std::swap(turns[k - 1], turns[(random_ >> 33) % k]);
    }
  }

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<void*> shared_;
  ucontext_t scheduler_;
  unsigned running_ = 0;
  uint64_t random_ = 1;
};

inline Index& block_index() {
  static Index index;
  return index;
}
inline Index& grid_size() {
  static Index size;
  return size;
}

inline void launch(int64_t x, int64_t y, int64_t z, unsigned threads, const std::function<void()>& kernel) {
  grid_size() = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  Index& index = block_index();
  for (index.z = 0; index.z < z; ++index.z)
    for (index.y = 0; index.y < y; ++index.y)
      for (index.x = 0; index.x < x; ++index.x) Block::current().run(threads, kernel);
}

}  // namespace bevperception::emulator

#define threadIdx (::bevperception::emulator::Index{::bevperception::emulator::Block::current().thread(), 0, 0})
#define blockIdx (::bevperception::emulator::block_index())
#define gridDim (::bevperception::emulator::grid_size())

inline void __syncwarp(unsigned mask) { ::bevperception::emulator::Block::current().sync(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  auto& block = ::bevperception::emulator::Block::current();
  return block.exchange(mask, value, block.thread() % 32 ^ static_cast<unsigned>(lane_mask));
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

using std::max;
using std::min;
