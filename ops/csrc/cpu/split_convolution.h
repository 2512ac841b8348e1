// A convolution as a product of matrices (pixels, taps and inputs) x (taps and inputs, outputs), by amx.h.
#pragma once

#include <algorithm>

#include "activations.h"
#include "amx.h"
#include "kernels.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kStepBytes = kTileParts * kTileBytes;  // of 16 rows

// 32 weights of an output, as the steps take them: by taps, then inputs; zeros beyond the last.
BEV_INLINE void weights_of_step(const SplitConvolution& problem, const float* of_output, int64_t step, float* numbers) {
  const int64_t taps = problem.kernel * problem.kernel;
  int64_t tap = step * kTileDepth / problem.inputs, input = step * kTileDepth % problem.inputs;
  for (int64_t i = 0; i < kTileDepth; ++i) {
    numbers[i] = tap < taps ? of_output[input * taps + tap] : 0.0f;
    if (++input == problem.inputs) input = 0, ++tap;
  }
}

// Weights (panels, steps), each tiles (part, half), of the pairs (panel, step) from begin to end.
void split_weights(const SplitConvolution& problem, char* weights, int64_t begin, int64_t end) {
  const int64_t steps = problem.steps(), depth = problem.depth();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t panel = i / steps, step = i % steps;
    for (int64_t half = 0; half < 2; ++half) {
      __m512i rows[kTileParts][16];
      for (int64_t o = 0; o < 16; ++o) {
        const float* from = problem.weight + (panel * kTileColumns + half * 16 + o) * depth;
        float numbers[kTileDepth];
        if (problem.kernel == 1 && problem.inputs % kTileDepth == 0) {
          from += step * kTileDepth;
        } else {
          weights_of_step(problem, from, step, numbers);
          from = numbers;
        }
        const SplitNumbers parts = split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
        for (int part = 0; part < kTileParts; ++part) rows[part][o] = parts.part[part];
      }
      for (int part = 0; part < kTileParts; ++part) {
        // A row of the tile: two numbers to sum over, of every output.
        transpose(rows[part]);
        char* const tile = weights + i * 2 * kStepBytes + (2 * part + half) * kTileBytes;
        for (int64_t row = 0; row < 16; ++row) _mm512_store_si512(tile + row * kTileLine, rows[part][row]);
      }
    }
  }
}

// Where one pixel of the result after the other looks at the map.
class Window {
 public:
  Window(const SplitConvolution& problem, int64_t pixel)
      : problem_(problem),
        column_(pixel % problem.out_width),
        row_(pixel / problem.out_width % problem.out_height),
        image_(problem.input + pixel / problem.out_width / problem.out_height * numbers_of_image()) {}

  void advance() {
    if (++column_ < problem_.out_width) return;
    column_ = 0;
    if (++row_ < problem_.out_height) return;
    row_ = 0;
    image_ += numbers_of_image();
  }

  // The inputs that a tap sees; null outside.
  const float* at(int64_t tap_row, int64_t tap_column) const {
    const int64_t row = row_ * problem_.stride - problem_.padding + tap_row, column = left() + tap_column;
    const bool inside = row >= 0 && row < problem_.height && column >= 0 && column < problem_.width;
    return inside ? image_ + (row * problem_.width + column) * problem_.inputs : nullptr;
  }

  bool has_whole_rows() const { return left() >= 0 && left() + problem_.kernel <= problem_.width; }

 private:
  int64_t left() const { return column_ * problem_.stride - problem_.padding; }
  int64_t numbers_of_image() const { return problem_.height * problem_.width * problem_.inputs; }

  const SplitConvolution& problem_;
  int64_t column_, row_;
  const float* image_;
};

BEV_INLINE void store_parts(const SplitNumbers& numbers, char* to) {
  for (int part = 0; part < kTileParts; ++part) _mm512_store_si512(to + part * kTileBytes, numbers.part[part]);
}

// What the block's pixels see, of the steps from begin to end: tiles (16 pixels, step, part).
void split_pixels(const SplitConvolution& problem, const SplitBlock& block, int64_t begin, int64_t end) {
  const int64_t groups = problem.inputs / kTileDepth;
  Window window(problem, block.first);
  for (int64_t i = 0; i < block.count; ++i, window.advance()) {
    char* to = block.pixels + i / kTileRows * (end - begin) * kStepBytes + i % kTileRows * kTileLine;
    for (int64_t step = begin; step < end;) {
      const int64_t tap = step / groups, group = step % groups, count = std::min(groups - group, end - step);
      const float* const inputs = window.at(tap / problem.kernel, tap % problem.kernel);
      for (int64_t g = group; g < group + count; ++g, to += kStepBytes) {
        const float* const from = inputs + g * kTileDepth;
        store_parts(inputs != nullptr ? split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)) : SplitNumbers{}, to);
      }
      step += count;
    }
  }
}

BEV_INLINE void copy_numbers(const float* from, int64_t count, float* to) {
  for (; count >= 16; count -= 16, from += 16, to += 16) _mm512_storeu_ps(to, _mm512_loadu_ps(from));
  const __mmask16 rest = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_storeu_ps(to, rest, _mm512_maskz_loadu_ps(rest, from));
}

// The same for maps of few inputs, of all steps: taps lie side by side in a step.
void split_pixels_of_few_inputs(const SplitConvolution& problem, const SplitBlock& block) {
  const int64_t steps = problem.steps(), row_numbers = problem.kernel * problem.inputs;
  // Of 16 pixels at a time, so that what is written has settled before it is read in another grouping.
  alignas(64) float seen[kTileRows][kSplitSteps * kTileDepth];
  for (auto& of_pixel : seen) std::fill(of_pixel + problem.depth(), of_pixel + steps * kTileDepth, 0.0f);
  Window window(problem, block.first);
  for (int64_t first = 0; first < block.count; first += kTileRows) {
    const int64_t count = std::min(kTileRows, block.count - first);
    for (int64_t i = 0; i < count; ++i, window.advance()) {
      for (int64_t row = 0; row < problem.kernel; ++row) {
        float* const to = seen[i] + row * row_numbers;
        const float* const from = window.has_whole_rows() ? window.at(row, 0) : nullptr;
        if (from != nullptr) {
          copy_numbers(from, row_numbers, to);
          continue;
        }
        for (int64_t column = 0; column < problem.kernel; ++column) {
          const float* const inputs = window.at(row, column);
          for (int64_t c = 0; c < problem.inputs; ++c) to[column * problem.inputs + c] = inputs ? inputs[c] : 0.0f;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      char* const to = block.pixels + first / kTileRows * steps * kStepBytes + i * kTileLine;
      for (int64_t step = 0; step < steps; ++step) {
        const float* const from = seen[i] + step * kTileDepth;
        store_parts(split(_mm512_load_ps(from), _mm512_load_ps(from + 16)), to + step * kStepBytes);
      }
    }
  }
}

// Sums (rows, 32) to outputs, with the bias, and what is there if wanted.
template <class Activate>
BEV_INLINE void finish_sums(const SplitConvolution& problem, const float* sums, const float* bias, int64_t rows,
                            float* output, const Activate& activate) {
  constexpr int kFull = kWidth<float>;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < kTileColumns; i += kFull) {
      float* const to = output + row * problem.outputs + i;
      Vector<float, kFull> sum = load<kFull>(sums + row * kTileColumns + i) + load<kFull>(bias + i);
      if (problem.adds) sum += load<kFull>(to);
      store<kFull>(to, activate(sum));
    }
  }
}

// A block's pixels of output (batch, out_height, out_width, outputs).
void split_block(const SplitConvolution& problem, const SplitBlock& block, float* output) {
  const TileRegisters registers;
  const int64_t steps = problem.steps(), panels = problem.outputs / kTileColumns;
  const int64_t pairs = (block.count + 2 * kTileRows - 1) / (2 * kTileRows);  // of tiles of pixels
  constexpr int64_t kLinesOfStep = 2 * kStepBytes / kTileLine;
  alignas(64) float done[TileSums::kNumbers];
  for (int64_t begin = 0; begin < steps; begin += kSplitSteps) {
    const int64_t end = std::min(begin + kSplitSteps, steps), count = end - begin;
    if (problem.inputs % kTileDepth == 0) {
      split_pixels(problem, block, begin, end);
    } else {
      split_pixels_of_few_inputs(problem, block);
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const char* const weights = block.weights + (panel * steps + begin) * 2 * kStepBytes;
      const char* const next = weights + steps * 2 * kStepBytes;
      Ahead following = panel + 1 < panels ? Ahead(next, next + count * 2 * kStepBytes) : Ahead();
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t first = pair * 2 * kTileRows, rows = std::min(block.count - first, 2 * kTileRows);
        float* const out = output + (block.first + first) * problem.outputs + panel * kTileColumns;
        float* const sums = block.sums + (panel * pairs + pair) * TileSums::kNumbers;
        const bool is_last = end == steps;
        for (int64_t row = 0; is_last && row < rows; ++row) {
          __builtin_prefetch(out + row * problem.outputs, 1, 3);
          __builtin_prefetch(out + row * problem.outputs + 16, 1, 3);
        }
        if (begin == 0) {
          TileSums::clear();
        } else {
          TileSums::load(sums);
        }
        const char* const upper = block.pixels + pair * 2 * count * kStepBytes;
        TileSums::add(upper, upper + count * kStepBytes, weights, count, following, kLinesOfStep / pairs + 1);
        TileSums::store(is_last ? done : sums);
        if (!is_last) continue;
        with_activation(problem.activation, [&](const auto& activate) {
          finish_sums(problem, done, problem.bias + panel * kTileColumns, rows, out, activate);
        });
      }
    }
  }
}

}  // namespace
}  // namespace bevperception::cpu
