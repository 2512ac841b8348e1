// Products of matrices whose right-hand side lies by panels: a few rows times one panel, held in registers.
#pragma once

#include "memory.h"
#include "vectors.h"

namespace bevperception::cpu {
namespace {

using Numbers = Vector<float, kWidth<float>>;

constexpr int64_t kPanel = 2 * kWidth<float>;               // columns of a panel
constexpr int64_t kRows = BEV_VECTOR_BYTES == 64 ? 12 : 6;  // as many as registers hold
constexpr int64_t kNumbersOfLine = 16;                      // of the cache
constexpr int64_t kStep = 8;  // of the depth: between two requests for what comes next

// (ROWS, depth) times (depth, panel). ahead(): asks for some of what comes next. finish(row, half, sum): takes the
// sums of a row in either half of the panel.
template <int64_t ROWS, class Ahead, class Finish>
BEV_INLINE void multiply_rows(const float* __restrict rows, int64_t row_stride, const float* __restrict panel,
                              int64_t depth, const Ahead& ahead, const Finish& finish) {
  constexpr int kFull = kWidth<float>;
  Numbers sum[ROWS][2] = {};
  for (int64_t begin = 0; begin < depth; begin += kStep) {
    ahead();
    for (int64_t c = begin; c < begin + kStep; ++c, panel += kPanel) {
      const Numbers left = load<kFull>(panel), right = load<kFull>(panel + kFull);
      for (int64_t r = 0; r < ROWS; ++r) {
        const Numbers number = broadcast<kFull>(rows[r * row_stride + c]);
        sum[r][0] += number * left;
        sum[r][1] += number * right;
      }
    }
  }
  for (int64_t r = 0; r < ROWS; ++r) {
    finish(r, 0, sum[r][0]);
    finish(r, 1, sum[r][1]);
  }
}

// Calls body.template run<ROWS>(first) for blocks of rows that cover 0 to count.
template <class Body>
BEV_INLINE void for_row_blocks(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; count - row >= kRows; row += kRows) body.template run<kRows>(row);
  for (; count - row >= 3; row += 3) body.template run<3>(row);
  for (; row < count; ++row) body.template run<1>(row);
}

}  // namespace
}  // namespace bevperception::cpu
