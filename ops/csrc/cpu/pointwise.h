// A 1x1 convolution of maps that exceed the cache. With few channels its sums take no longer than the memory does: while
// one panel is summed up, the cache fetches what the next will be added to, and the pixels that come after these.
#pragma once

#include "kernels.h"
#include "matrix.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kPixels = 4 * kRows;  // that are worked on together, in the first-level cache

// Weights (panels, inputs, panel), of the pairs (panel, input) from begin to end.
void pointwise_weights(const Pointwise& problem, float* by_panel, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* from = problem.weight + i / problem.inputs * kPanel * problem.inputs + i % problem.inputs;
    for (int64_t o = 0; o < kPanel; ++o) by_panel[i * kPanel + o] = from[o * problem.inputs];
  }
}

// Asks for a piece of a map, as many rows and as wide as a product of multiply_rows.
class PieceAhead {
 public:
  PieceAhead(const float* piece, int64_t row_stride, int64_t requests)
      : piece_(piece), row_stride_(row_stride), lines_((kLinesOfPiece + requests - 1) / requests) {}

  void ask() {
    for (int64_t i = 0; i < lines_ && next_ < kLinesOfPiece; ++i, ++next_) {
      __builtin_prefetch(piece_ + next_ / kLinesOfRow * row_stride_ + next_ % kLinesOfRow * kNumbersOfLine, 1, 3);
    }
  }

 private:
  static constexpr int64_t kLinesOfRow = (kPanel + kNumbersOfLine - 1) / kNumbersOfLine;
  static constexpr int64_t kLinesOfPiece = kRows * kLinesOfRow;

  const float* piece_;
  int64_t row_stride_, lines_, next_ = 0;
};

// One panel of a run of pixels.
struct PointwisePanel {
  const Pointwise& problem;
  const float* weights;
  const float* bias;
  const float* input;  // of the first pixel
  float* output;       // of the first pixel, of this panel
  const float* next_output;  // what is worked on after this, laid out the same
  Numbers least;
  Ahead& following_input;
  int64_t input_lines;  // of it to ask for at a time

  template <int64_t ROWS>
  BEV_INLINE void run(int64_t row) const {
    constexpr int kFull = kWidth<float>;
    const int64_t stride = problem.outputs;
    PieceAhead piece(next_output + row * stride, stride, problem.inputs / kStep);
    multiply_rows<ROWS>(input + row * problem.inputs, problem.inputs, weights, problem.inputs, [&] { piece.ask(), following_input.ask(input_lines); },
                        [&](int64_t r, int64_t half, Numbers sum) {
                          float* const out = output + (row + r) * stride + half * kFull;
                          sum += load<kFull>(bias + half * kFull);
                          if (problem.adds) sum += load<kFull>(out);
                          // In this order, so that what is not a number stays so.
                          store<kFull>(out, sum < least ? least : sum);
                        });
  }
};

// Pixels from begin to end.
void pointwise(const Pointwise& problem, const float* by_panel, float* output, int64_t begin, int64_t end) {
  const Numbers least = problem.relu ? Numbers{} : broadcast<kWidth<float>>(-__builtin_inff());
  const int64_t panels = problem.outputs / kPanel;
  const int64_t requests = panels * (kPixels / kRows) * (problem.inputs / kStep);
  const int64_t input_lines = (kPixels * problem.inputs / kNumbersOfLine + requests - 1) / requests;
  for (int64_t first = begin; first < end; first += kPixels) {
    const int64_t count = end - first < kPixels ? end - first : kPixels;
    const float* const input = problem.input + first * problem.inputs;
    float* const out = output + first * problem.outputs;
    const float* const following = first + kPixels < end ? out + kPixels * problem.outputs : out;
    Ahead following_input(input + count * problem.inputs, problem.input + end * problem.inputs);
    for (int64_t p = 0; p < panels; ++p) {
      const float* const next = p + 1 < panels ? out + (p + 1) * kPanel : following;
      for_row_blocks(count, PointwisePanel{problem, by_panel + p * problem.inputs * kPanel, problem.bias + p * kPanel,
                                           input, out + p * kPanel, next, least, following_input, input_lines});
    }
  }
}

}  // namespace
}  // namespace bevperception::cpu
