// A 3x3 convolution for PyTorch on the CPU, without gradients.
#include "binding.h"

namespace bevperception {
namespace {

constexpr const char* kName = "convolve_3x3";
constexpr int64_t kPositions = 36;  // of a tile's transform
constexpr int64_t kChannels = 32;   // their numbers are multiples of it
constexpr int64_t kRows = 12;       // tiles of a block: a multiple of it, so that none is worked on alone

constexpr int64_t kLine = 16;       // numbers of a cache line

// Numbers from one row to the next that is used together with it: an odd number of cache lines, as else all would
// compete for the same few places in the cache.
int64_t odd_lines(int64_t numbers) { return ((numbers + kLine - 1) / kLine | 1) * kLine; }

// Memory for blocks of so many tiles.
struct BlockShape {
  int64_t tiles, patch_row, patch_stride, product_stride;

  BlockShape(const cpu::Convolution3x3& problem, int64_t bytes) {
    const int64_t bytes_of_tile = kPositions * (problem.inputs + problem.outputs) * static_cast<int64_t>(sizeof(float));
    tiles = std::min(std::max(bytes / bytes_of_tile / kRows, int64_t(1)) * kRows, problem.tiles());
    patch_row = odd_lines(problem.inputs);
    patch_stride = odd_lines(tiles * patch_row);
    product_stride = odd_lines(tiles * problem.outputs);
  }

  int64_t numbers() const { return kPositions * (patch_stride + product_stride); }
  int64_t blocks(const cpu::Convolution3x3& problem) const { return (problem.tiles() + tiles - 1) / tiles; }

  cpu::WinogradBlock block(const cpu::Convolution3x3& problem, int64_t index, const float* kernels,
                           float* memory) const {
    const int64_t first = index * tiles;
    return {first,        std::min(tiles, problem.tiles() - first), kernels, memory, memory + kPositions * patch_stride,
            patch_row,    patch_stride,                                 product_stride};
  }
};

// Each thread takes blocks that fit its second-level cache through all steps.
void block_by_block(const cpu::Convolution3x3& problem, const cpu::WinogradKernels& steps, const float* kernels,
                    float* output) {
  constexpr int64_t kBytes = 900 << 10;
  const BlockShape shape(problem, kBytes);
  const int64_t work = shape.tiles * kPositions * problem.inputs * problem.outputs;
  const int64_t products = kPositions * problem.outputs / steps.panel;
  share_out(shape.blocks(problem), work, [&](int64_t begin, int64_t end) {
    const cpu::KeptMemory memory(shape.numbers() * static_cast<int64_t>(sizeof(float)));
    for (int64_t i = begin; i < end; ++i) {
      const cpu::WinogradBlock block = shape.block(problem, i, kernels, static_cast<float*>(memory.data()));
      steps.patches(problem, block, 0, block.count);
      steps.products(problem, block, 0, products);
      steps.outputs(problem, block, output, 0, block.count);
    }
  });
}

// All threads take a large block through one step after the other: kernels that exceed the caches are read less often.
void step_by_step(const cpu::Convolution3x3& problem, const cpu::WinogradKernels& steps, const float* kernels,
                  float* output, const Tensor& like) {
  constexpr int64_t kBytes = 16 << 20;
  const BlockShape shape(problem, kBytes);
  const Tensor memory = empty_result(like, {shape.numbers()});
  const int64_t panels = problem.outputs / steps.panel;
  for (int64_t i = 0; i < shape.blocks(problem); ++i) {
    const cpu::WinogradBlock block = shape.block(problem, i, kernels, mutable_data_of<float>(memory));
    share_out(block.count, kPositions * problem.inputs,
              [&](int64_t begin, int64_t end) { steps.patches(problem, block, begin, end); });
    share_out(kPositions * panels, block.count * problem.inputs * steps.panel,
              [&](int64_t begin, int64_t end) { steps.products(problem, block, begin, end); });
    share_out(block.count, kPositions * problem.outputs,
              [&](int64_t begin, int64_t end) { steps.outputs(problem, block, output, begin, end); });
  }
}

Tensor convolve_3x3(const Tensor& input, const Tensor& weight, const Tensor& bias, bool relu) {
  for (const Tensor* tensor : {&input, &weight, &bias}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, kName, ": takes float32");
  }
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, kName, ": input and weight must have 4 dimensions");
  const int64_t inputs = input.size(3), outputs = weight.size(0);
  STD_TORCH_CHECK(inputs % kChannels == 0 && outputs % kChannels == 0, kName, ": channels must be multiples of ",
                  kChannels);
  require_shape(kName, "the weight", weight, {outputs, inputs, 3, 3});
  require_shape(kName, "the bias", bias, {outputs});
  const Tensor pixels = torch::stable::contiguous(input), taps = torch::stable::contiguous(weight),
               shifts = torch::stable::contiguous(bias);
  Tensor output = empty_result(input, {input.size(0), input.size(1), input.size(2), outputs});
  if (output.numel() == 0) return output;
  const cpu::Convolution3x3 problem{input.size(0), input.size(1),         input.size(2),       inputs,
                                    outputs,       data_of<float>(pixels), data_of<float>(taps), data_of<float>(shifts),
                                    relu};
  const cpu::WinogradKernels& steps = cpu::current_isa().winograd;
  Tensor kernels = empty_result(input, {kPositions * outputs * inputs});
  float* transformed = mutable_data_of<float>(kernels);
  share_out(outputs / steps.panel * inputs, kPositions * steps.panel, [&](int64_t begin, int64_t end) {
    steps.kernels(problem, transformed, begin, end);
  });
  constexpr int64_t kFewWeights = 128 * 128;
  float* out = mutable_data_of<float>(output);
  if (inputs * outputs <= kFewWeights) {
    block_by_block(problem, steps, transformed, out);
  } else {
    step_by_step(problem, steps, transformed, out, input);
  }
  return output;
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def("convolve_3x3(Tensor input, Tensor weight, Tensor bias, bool relu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("convolve_3x3", TORCH_BOX(&bevperception::convolve_3x3));
}
