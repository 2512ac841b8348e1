// A 3x3 convolution by a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).
//
// Each 6x6 patch of the input and each 3x3 kernel become 36 numbers; their products, summed over the input's
// channels, become 4x4 outputs. Of each of the 36 the sums are a product of matrices. The points of the transform are
// 0, +-1/sqrt(2), +-sqrt(2) and infinity, at which rounding errors are about a direct sum's twofold.
//
// Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.
#pragma once

#include "kernels.h"
#include "matrix.h"

namespace bevperception::cpu {
namespace {

constexpr int64_t kPositions = 36;  // numbers of a transformed patch or kernel

constexpr float kNear = 0.70710678118654752f, kFar = 1.41421356237309505f;

// 36 numbers of a patch, of as many channels as a vector has.
struct Square {
  Numbers at[6][6];
};

// One axis of the input's transform: six numbers `step` vectors apart, in place.
BEV_INLINE void transform_patch(Numbers* line, int step) {
  const Numbers d0 = line[0], d1 = line[step], d2 = line[2 * step], d3 = line[3 * step], d4 = line[4 * step],
                d5 = line[5 * step];
  const Numbers even_near = d4 - 2.0f * d2, odd_near = kNear * (d3 - 2.0f * d1);
  const Numbers even_far = d4 - 0.5f * d2, odd_far = kFar * (d3 - 0.5f * d1);
  line[0] = d0 - 2.5f * d2 + d4;
  line[step] = even_near + odd_near;
  line[2 * step] = even_near - odd_near;
  line[3 * step] = even_far + odd_far;
  line[4 * step] = even_far - odd_far;
  line[5 * step] = d1 - 2.5f * d3 + d5;
}

// One axis of the kernel's transform: three numbers become six.
BEV_INLINE void transform_kernel(Numbers k0, Numbers k1, Numbers k2, Numbers* line, int step) {
  constexpr float kThird = 1.0f / 3.0f;
  const Numbers even_near = -kThird * (2.0f * k0 + k2), odd_near = -kThird * kFar * k1;
  const Numbers even_far = kThird * (0.5f * k0 + k2), odd_far = kThird * kNear * k1;
  line[0] = k0;
  line[step] = even_near + odd_near;
  line[2 * step] = even_near - odd_near;
  line[3 * step] = even_far + odd_far;
  line[4 * step] = even_far - odd_far;
  line[5 * step] = k2;
}

// One axis of the way back: six numbers become four, in place.
BEV_INLINE void transform_back(Numbers* line, int step) {
  const Numbers even_near = line[step] + line[2 * step], odd_near = line[step] - line[2 * step];
  const Numbers even_far = line[3 * step] + line[4 * step], odd_far = line[3 * step] - line[4 * step];
  line[0] = line[0] + even_near + even_far;
  line[step] = kNear * odd_near + kFar * odd_far;
  line[2 * step] = 0.5f * even_near + 2.0f * even_far;
  line[3 * step] = 0.5f * kNear * odd_near + 2.0f * kFar * odd_far + line[5 * step];
}

// Transformed kernels, 36 times (panels, inputs, panel), of the pairs (panel, input) from begin to end.
void winograd_kernels(const Convolution3x3& problem, float* transformed, int64_t begin, int64_t end) {
  constexpr int kFull = kWidth<float>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i / problem.inputs * kPanel, input = i % problem.inputs;
    for (int64_t half = 0; half < kPanel; half += kFull) {
      const float* from = problem.weight + ((first + half) * problem.inputs + input) * 9;
      float taps[9][kFull];
      for (int o = 0; o < kFull; ++o) {
        for (int k = 0; k < 9; ++k) taps[k][o] = from[o * problem.inputs * 9 + k];
      }
      Square square;
      for (int x = 0; x < 3; ++x) {
        transform_kernel(load<kFull>(taps[x]), load<kFull>(taps[3 + x]), load<kFull>(taps[6 + x]), &square.at[0][x], 6);
      }
      for (int y = 0; y < 6; ++y) {
        transform_kernel(square.at[y][0], square.at[y][1], square.at[y][2], square.at[y], 1);
        for (int x = 0; x < 6; ++x) {
          store<kFull>(transformed + (6 * y + x) * problem.kernel_stride + i * kPanel + half, square.at[y][x]);
        }
      }
    }
  }
}

// The patches of a block's tiles from begin to end.
void winograd_patches(const Convolution3x3& problem, const WinogradBlock& block, int64_t begin, int64_t end) {
  constexpr int kFull = kWidth<float>;
  static const float zeros[kFull] = {};
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile tile = problem.tile(block.first + t);
    const float* pixels[6][6];  // null: outside
    for (int64_t y = 0; y < 6; ++y) {
      for (int64_t x = 0; x < 6; ++x) {
        const int64_t row = tile.row + y - 1, column = tile.column + x - 1;
        const bool inside = row >= 0 && row < problem.height && column >= 0 && column < problem.width;
        const int64_t pixel = (tile.image * problem.height + row) * problem.width + column;
        pixels[y][x] = inside ? problem.input + pixel * problem.inputs : nullptr;
      }
    }
    float* const patch = block.patches + t * block.patch_row;
    for (int64_t c = 0; c < problem.inputs; c += kFull) {
      Square square;
      for (int x = 0; x < 6; ++x) {
        for (int y = 0; y < 6; ++y) square.at[y][x] = load<kFull>(pixels[y][x] != nullptr ? pixels[y][x] + c : zeros);
        transform_patch(&square.at[0][x], 6);
      }
      for (int y = 0; y < 6; ++y) {
        transform_patch(square.at[y], 1);
        for (int x = 0; x < 6; ++x) store<kFull>(patch + (6 * y + x) * block.patch_stride + c, square.at[y][x]);
      }
    }
  }
}

// Some rows of a product.
struct WinogradRows {
  const float* patches;
  int64_t patch_row;
  const float* kernels;
  int64_t depth;
  float* products;
  int64_t product_row;
  Ahead& following;  // kernels that come next
  int64_t lines;     // of them to ask for at a time

  template <int64_t ROWS>
  BEV_INLINE void run(int64_t row) const {
    multiply_rows<ROWS>(patches + row * patch_row, patch_row, kernels, depth, [&] { following.ask(lines); },
                        [&](int64_t r, int64_t half, const Numbers& sum) {
                          store<kWidth<float>>(products + (row + r) * product_row + half * kWidth<float>, sum);
                        });
  }
};

// The products of a block, of the pairs (position, panel) from begin to end.
void winograd_products(const Convolution3x3& problem, const WinogradBlock& block, int64_t begin, int64_t end) {
  const int64_t depth = problem.inputs, panels = problem.outputs / kPanel;
  for (int64_t i = begin; i < end; ++i) {
    const float* const patches = block.patches + i / panels * block.patch_stride;
    const float* const kernels = block.kernels + i / panels * problem.kernel_stride + i % panels * depth * kPanel;
    const float* const next = kernels + depth * kPanel;
    float* const out = block.products + i / panels * block.product_stride + i % panels * kPanel;
    Ahead following = (i + 1) % panels == 0 ? Ahead() : Ahead(next, next + depth * kPanel);
    const int64_t requests = (block.count / kRows + 1) * (depth / kStep);
    for_row_blocks(block.count, WinogradRows{patches, block.patch_row, kernels, depth, out, problem.outputs, following,
                                             depth * kPanel / kNumbersOfLine / requests + 1});
  }
}

// The outputs of a block's tiles from begin to end.
void winograd_outputs(const Convolution3x3& problem, const WinogradBlock& block, float* output, int64_t begin,
                      int64_t end) {
  constexpr int kFull = kWidth<float>;
  const Numbers least = problem.relu ? Numbers{} : broadcast<kFull>(-__builtin_inff());
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile tile = problem.tile(block.first + t);
    const int64_t high = problem.height - tile.row < 4 ? problem.height - tile.row : 4;
    const int64_t wide = problem.width - tile.column < 4 ? problem.width - tile.column : 4;
    const int64_t line = problem.width * problem.outputs;
    float* const first = output + (tile.image * problem.height + tile.row) * line + tile.column * problem.outputs;
    for (int64_t c = 0; c < problem.outputs; c += kFull) {
      const float* const products = block.products + t * problem.outputs + c;
      Square square;
      for (int x = 0; x < 6; ++x) {
        for (int y = 0; y < 6; ++y) square.at[y][x] = load<kFull>(products + (6 * y + x) * block.product_stride);
        transform_back(&square.at[0][x], 6);
      }
      const Numbers bias = load<kFull>(problem.bias + c);
      for (int64_t y = 0; y < high; ++y) {
        transform_back(square.at[y], 1);
        for (int64_t x = 0; x < wide; ++x) {
          const Numbers sum = square.at[y][x] + bias;
          // In this order, so that what is not a number stays so.
          store<kFull>(first + y * line + x * problem.outputs + c, sum < least ? least : sum);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bevperception::cpu
