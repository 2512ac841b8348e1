// Convolutions for PyTorch on the CPU, without gradients.
#include <string>
#include <utility>

#include "binding.h"

namespace bevperception {
namespace {

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
void block_by_block(const cpu::Convolution3x3& problem, const cpu::Isa& isa, const float* kernels, float* output) {
  const cpu::WinogradKernels& steps = isa.winograd;
  constexpr int64_t kBytes = 900 << 10;
  const BlockShape shape(problem, kBytes);
  const int64_t work = shape.tiles * kPositions * problem.inputs * problem.outputs;
  const int64_t products = kPositions * problem.outputs / isa.panel;
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
void step_by_step(const cpu::Convolution3x3& problem, const cpu::Isa& isa, const float* kernels, float* output,
                  const Tensor& like) {
  const cpu::WinogradKernels& steps = isa.winograd;
  constexpr int64_t kBytes = 16 << 20;
  const BlockShape shape(problem, kBytes);
  const Tensor memory = empty_result(like, {shape.numbers()});
  const int64_t panels = problem.outputs / isa.panel;
  for (int64_t i = 0; i < shape.blocks(problem); ++i) {
    const cpu::WinogradBlock block = shape.block(problem, i, kernels, mutable_data_of<float>(memory));
    share_out(block.count, kPositions * problem.inputs,
              [&](int64_t begin, int64_t end) { steps.patches(problem, block, begin, end); });
    share_out(kPositions * panels, block.count * problem.inputs * isa.panel,
              [&](int64_t begin, int64_t end) { steps.products(problem, block, begin, end); });
    share_out(block.count, kPositions * problem.outputs,
              [&](int64_t begin, int64_t end) { steps.outputs(problem, block, output, begin, end); });
  }
}

void require_float(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, op, ": takes float32");
  }
}

void require_channels(const char* op, int64_t inputs, int64_t outputs) {
  STD_TORCH_CHECK(inputs > 0 && inputs % kChannels == 0 && outputs > 0 && outputs % kChannels == 0, op,
                  ": channels must be multiples of ", kChannels, ", got ", inputs, " and ", outputs);
}

Tensor convolve_3x3(const Tensor& input, const Tensor& weight, const Tensor& bias, bool relu) {
  constexpr const char* kName = "convolve_3x3";
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, kName, ": input and weight must have 4 dimensions");
  const int64_t inputs = input.size(3), outputs = weight.size(0);
  require_float(kName, {&input, &weight, &bias});
  require_channels(kName, inputs, outputs);
  require_shape(kName, "the weight", weight, {outputs, inputs, 3, 3});
  require_shape(kName, "the bias", bias, {outputs});
  const Tensor pixels = torch::stable::contiguous(input), taps = torch::stable::contiguous(weight),
               shifts = torch::stable::contiguous(bias);
  Tensor output = empty_result(input, {input.size(0), input.size(1), input.size(2), outputs});
  if (output.numel() == 0) return output;
  const cpu::Convolution3x3 problem{input.size(0), input.size(1),         input.size(2),       inputs,
                                    outputs,       data_of<float>(pixels), data_of<float>(taps), data_of<float>(shifts),
                                    relu,          odd_lines(inputs * outputs)};
  const cpu::Isa& isa = cpu::current_isa();
  Tensor kernels = empty_result(input, {kPositions * problem.kernel_stride});
  float* transformed = mutable_data_of<float>(kernels);
  share_out(outputs / isa.panel * inputs, kPositions * isa.panel, [&](int64_t begin, int64_t end) {
    isa.winograd.kernels(problem, transformed, begin, end);
  });
  constexpr int64_t kFewWeights = 128 * 128;
  float* out = mutable_data_of<float>(output);
  if (inputs * outputs <= kFewWeights) {
    block_by_block(problem, isa, transformed, out);
  } else {
    step_by_step(problem, isa, transformed, out, input);
  }
  return output;
}

// Into result (pixels, outputs), contiguous; added to what it holds if `adds`.
void convolve_1x1_(Tensor result, const Tensor& input, const Tensor& weight, const Tensor& bias, bool adds, bool relu) {
  constexpr const char* kName = "convolve_1x1_";
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2, kName, ": input and weight must have 2 dimensions");
  const int64_t pixels = input.size(0), inputs = input.size(1), outputs = weight.size(0);
  require_float(kName, {&result, &input, &weight, &bias});
  require_channels(kName, inputs, outputs);
  require_shape(kName, "the weight", weight, {outputs, inputs});
  require_shape(kName, "the bias", bias, {outputs});
  require_shape(kName, "the result", result, {pixels, outputs});
  STD_TORCH_CHECK(result.is_contiguous(), kName, ": the result must be contiguous");
  const Tensor from = torch::stable::contiguous(input), factors = torch::stable::contiguous(weight),
               shifts = torch::stable::contiguous(bias);
  if (result.numel() == 0) return;
  const cpu::Pointwise problem{inputs, outputs, data_of<float>(from), data_of<float>(factors), data_of<float>(shifts),
                               adds,   relu};
  const cpu::Isa& isa = cpu::current_isa();
  Tensor weights = empty_result(input, {outputs * inputs});
  float* by_panel = mutable_data_of<float>(weights);
  share_out(outputs / isa.panel * inputs, isa.panel, [&](int64_t begin, int64_t end) {
    isa.pointwise.weights(problem, by_panel, begin, end);
  });
  float* out = mutable_data_of<float>(result);
  share_out(pixels, inputs * outputs, [&](int64_t begin, int64_t end) {
    isa.pointwise.pixels(problem, by_panel, out, begin, end);
  });
}

// So many pixels that every thread has as many blocks, and that what is split of them fits the first-level cache, or
// with their sums the second-level cache.
int64_t pixels_of_block(const cpu::SplitConvolution& problem) {
  constexpr int64_t kPair = 32, kMost = 6 * kPair, kFewSteps = 5;
  if (problem.steps() <= kFewSteps) return kPair;
  const int64_t threads = torch::stable::get_num_threads(), pixels = problem.pixels();
  const int64_t rounds = (pixels + kMost * threads - 1) / (kMost * threads);
  const int64_t even = (pixels + rounds * threads - 1) / (rounds * threads);
  return (even + kPair - 1) / kPair * kPair;
}

void convolve_by_blocks(const cpu::SplitConvolution& problem, const cpu::SplitKernels& kernels, float* output) {
  constexpr int64_t kBytes = 6;  // of a split number
  const cpu::KeptMemory memory(problem.outputs * problem.steps() * kChannels * kBytes, cpu::KeptMemory::kWeights);
  char* const weights = static_cast<char*>(memory.data());
  share_out(problem.outputs / kChannels * problem.steps(), kChannels * kChannels,
            [&](int64_t begin, int64_t end) { kernels.weights(problem, weights, begin, end); });
  const int64_t pixels = pixels_of_block(problem);
  const int64_t split_bytes = pixels * std::min(problem.steps(), cpu::kSplitSteps) * kChannels * kBytes;
  const int64_t sums_bytes = pixels * problem.outputs * static_cast<int64_t>(sizeof(float));
  share_out((problem.pixels() + pixels - 1) / pixels, pixels * problem.outputs * problem.steps() * kChannels,
            [&](int64_t begin, int64_t end) {
              const cpu::KeptMemory scratch(split_bytes + (problem.steps() > cpu::kSplitSteps ? sums_bytes : 0));
              char* const split = static_cast<char*>(scratch.data());
              for (int64_t i = begin; i < end; ++i) {
                const int64_t first = i * pixels, count = std::min(pixels, problem.pixels() - first);
                kernels.block(problem, {first, count, weights, split, reinterpret_cast<float*>(split + split_bytes)},
                              output);
              }
            });
}

cpu::Activation activation_named(const char* op, const std::string& name) {
  constexpr std::pair<const char*, cpu::Activation> kNames[] = {{"none", cpu::Activation::kNone},
                                                                {"relu", cpu::Activation::kRelu},
                                                                {"gelu", cpu::Activation::kGelu},
                                                                {"silu", cpu::Activation::kSilu}};
  for (const auto& [known, activation] : kNames) {
    if (name == known) return activation;
  }
  STD_TORCH_CHECK(false, op, ": the activation must be none, relu, gelu or silu, got '", name, "'");
}

// Into result (batch, out_height, out_width, outputs), contiguous; added to what it holds if `adds`.
void convolve_split_(Tensor result, const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t stride,
                     int64_t padding, bool adds, std::string activation) {
  constexpr const char* kName = "convolve_split_";
  const cpu::SplitKernels* const kernels = cpu::current_isa().split;
  STD_TORCH_CHECK(kernels != nullptr, kName, ": needs the instruction set amx, which is not in use");
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, kName, ": input and weight must have 4 dimensions");
  const int64_t inputs = input.size(3), outputs = weight.size(0), kernel = weight.size(2);
  require_float(kName, {&result, &input, &weight, &bias});
  constexpr int64_t kMost = 1024;  // so that no product of sizes overflows
  STD_TORCH_CHECK(kernel >= 1 && kernel <= kMost && stride >= 1 && stride <= kMost && padding >= 0 && padding < kernel,
                  kName, ": the kernel and its stride must be 1 to ", kMost, ", the padding less than the kernel, got ",
                  kernel, ", ", stride, " and ", padding);
  constexpr int64_t kFew = cpu::kSplitSteps * kChannels;
  if (inputs < 1 || inputs > kFew || kernel * kernel * inputs > kFew) require_channels(kName, inputs, outputs);
  require_channels(kName, kChannels, outputs);
  require_shape(kName, "the weight", weight, {outputs, inputs, kernel, kernel});
  require_shape(kName, "the bias", bias, {outputs});
  const int64_t height = input.size(1), width = input.size(2);
  STD_TORCH_CHECK(height + 2 * padding >= kernel && width + 2 * padding >= kernel, kName,
                  ": the padded map must be as large as the kernel");
  const int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
  const int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
  require_shape(kName, "the result", result, {input.size(0), out_height, out_width, outputs});
  STD_TORCH_CHECK(result.is_contiguous(), kName, ": the result must be contiguous");
  const Tensor from = torch::stable::contiguous(input), factors = torch::stable::contiguous(weight),
               shifts = torch::stable::contiguous(bias);
  if (result.numel() == 0) return;
  const cpu::SplitConvolution problem{input.size(0), height,  width,      inputs,    outputs,
                                      kernel,        stride,  padding,    out_height, out_width,
                                      data_of<float>(from), data_of<float>(factors), data_of<float>(shifts),
                                      adds,          activation_named(kName, activation)};
  convolve_by_blocks(problem, *kernels, mutable_data_of<float>(result));
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def("convolve_3x3(Tensor input, Tensor weight, Tensor bias, bool relu) -> Tensor");
  m.def("convolve_1x1_(Tensor(a!) result, Tensor input, Tensor weight, Tensor bias, bool adds, bool relu) -> ()");
  m.def(
      "convolve_split_(Tensor(a!) result, Tensor input, Tensor weight, Tensor bias, int stride, int padding, bool adds, "
      "str activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("convolve_3x3", TORCH_BOX(&bevperception::convolve_3x3));
  m.impl("convolve_1x1_", TORCH_BOX(&bevperception::convolve_1x1_));
  m.impl("convolve_split_", TORCH_BOX(&bevperception::convolve_split_));
}
