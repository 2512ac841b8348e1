// A convolution as a product of matrices (pixels, taps and inputs) x (taps and inputs, outputs), by amx.h.
#pragma once

#include <algorithm>

#include "amx.h"
#include "kernels.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kStepBytes = kTileParts * kTileBytes;  // of 16 rows

// Weights (panels, steps), each tiles (part, half), of the pairs (panel, 32 inputs) from begin to end.
void split_weights(const SplitConvolution& problem, char* weights, int64_t begin, int64_t end) {
  const int64_t groups = problem.inputs / kTileDepth, taps = problem.kernel * problem.kernel;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t panel = i / groups, group = i % groups;
    for (int64_t tap = 0; tap < taps; ++tap) {
      char* const tiles = weights + (panel * problem.steps() + tap * groups + group) * 2 * kStepBytes;
      for (int64_t half = 0; half < 2; ++half) {
        __m512i rows[kTileParts][16];
        for (int64_t o = 0; o < 16; ++o) {
          const int64_t output = panel * kTileColumns + half * 16 + o;
          const float* from = problem.weight + (output * problem.inputs + group * kTileDepth) * taps + tap;
          float numbers[kTileDepth];
          if (taps > 1) {
            for (int64_t c = 0; c < kTileDepth; ++c) numbers[c] = from[c * taps];
            from = numbers;
          }
          const SplitNumbers parts = split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
          for (int part = 0; part < kTileParts; ++part) rows[part][o] = parts.part[part];
        }
        for (int part = 0; part < kTileParts; ++part) {
          // A row of the tile: two inputs in a row, of every output.
          transpose(rows[part]);
          char* const tile = tiles + (2 * part + half) * kTileBytes;
          for (int64_t row = 0; row < 16; ++row) _mm512_store_si512(tile + row * kTileLine, rows[part][row]);
        }
      }
    }
  }
}

// What the block's pixels see, of the steps from begin to end: tiles (16 pixels, step, part).
void split_pixels(const SplitConvolution& problem, const SplitBlock& block, int64_t begin, int64_t end) {
  const int64_t groups = problem.inputs / kTileDepth;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t pixel = block.first + i, line = pixel / problem.out_width;
    const int64_t top = line % problem.out_height * problem.stride - problem.padding;
    const int64_t left = pixel % problem.out_width * problem.stride - problem.padding;
    const float* const image = problem.input + line / problem.out_height * problem.height * problem.width * problem.inputs;
    char* to = block.pixels + i / kTileRows * (end - begin) * kStepBytes + i % kTileRows * kTileLine;
    for (int64_t step = begin; step < end;) {
      const int64_t tap = step / groups, group = step % groups, count = std::min(groups - group, end - step);
      const int64_t row = top + tap / problem.kernel, column = left + tap % problem.kernel;
      const bool inside = row >= 0 && row < problem.height && column >= 0 && column < problem.width;
      const float* from = inside ? image + (row * problem.width + column) * problem.inputs + group * kTileDepth : nullptr;
      for (int64_t s = 0; s < count; ++s, to += kStepBytes) {
        const SplitNumbers parts =
            inside ? split(_mm512_loadu_ps(from + s * kTileDepth), _mm512_loadu_ps(from + s * kTileDepth + 16))
                   : SplitNumbers{};
        for (int part = 0; part < kTileParts; ++part) _mm512_store_si512(to + part * kTileBytes, parts.part[part]);
      }
      step += count;
    }
  }
}

// Sums (rows, 32) to outputs, with the bias, and what is there if wanted.
BEV_INLINE void finish_sums(const SplitConvolution& problem, const float* sums, const float* bias, int64_t rows,
                            float* output) {
  const __m512 least = problem.relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t half = 0; half < kTileColumns; half += 16) {
      float* const to = output + row * problem.outputs + half;
      __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + row * kTileColumns + half), _mm512_loadu_ps(bias + half));
      if (problem.adds) sum = _mm512_add_ps(sum, _mm512_loadu_ps(to));
      // In this order, so that what is not a number stays so.
      _mm512_storeu_ps(to, _mm512_max_ps(least, sum));
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
    split_pixels(problem, block, begin, end);
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
        if (is_last) finish_sums(problem, done, problem.bias + panel * kTileColumns, rows, out);
      }
    }
  }
}

}  // namespace
}  // namespace bevperception::cpu
