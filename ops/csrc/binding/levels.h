// Feature levels as the attention operators take them.
#pragma once

#include <limits>

#include "tensors.h"

namespace bevperception {

// shapes: height and width of each level.
inline std::vector<Level> levels_of(const char* op, const std::vector<int64_t>& shapes) {
  STD_TORCH_CHECK(!shapes.empty() && shapes.size() % 2 == 0, op,
                  ": spatial_shapes must hold height and width of at least one level");
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t k = 0; k < shapes.size(); k += 2) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(shapes[k] > 0 && shapes[k + 1] > 0, op, ": level sizes must be positive");
    STD_TORCH_CHECK(shapes[k] <= kMost && shapes[k + 1] <= kMost, op, ": more than 2^31 - 1 cells");
    levels.push_back({static_cast<int32_t>(shapes[k]), static_cast<int32_t>(shapes[k + 1]),
                      static_cast<int32_t>(start)});
    start += shapes[k] * shapes[k + 1];
    STD_TORCH_CHECK(start <= kMost, op, ": more than 2^31 - 1 cells");
  }
  return levels;
}

// Cells of all levels together.
inline int64_t cells_of(const std::vector<Level>& levels) {
  const Level& last = levels.back();
  return last.start + int64_t(last.height) * last.width;
}

}  // namespace bevperception
