// Layer norm and softmax of rows for PyTorch on the CPU, without gradients.
#include "tensors.h"

namespace bevperception {
namespace {

int64_t length_of_rows(const char* op, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0, op, ": a single number has no rows");
  const int64_t length = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(length > 0 || tensor.numel() == 0, op, ": rows must hold at least one number");
  return length;
}

template <class Stored, class T, class Kernel>
void normalise(const Tensor& input, const Tensor& weight, const Tensor& bias, double epsilon, const Tensor& output,
               const Kernel& kernel) {
  const int64_t channels = input.size(input.dim() - 1);
  const cpu::LayerNorm<Stored, T> problem{data_of<Stored>(input), data_of<T>(weight), data_of<T>(bias), channels,
                                          static_cast<T>(epsilon)};
  Stored* out = mutable_data_of<Stored>(output);
  share_out(input.numel() / channels, 4 * channels + 32,
            [&](int64_t begin, int64_t end) { kernel(problem, out, begin, end); });
}

Tensor layer_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, double epsilon) {
  constexpr const char* kName = "layer_norm";
  const bool is_half = input.scalar_type() == ScalarType::BFloat16;
  if (!is_half) require_same_dtype(kName, {&input, &weight, &bias});
  require_same_dtype(kName, {&weight, &bias});
  STD_TORCH_CHECK(!is_half || weight.scalar_type() == ScalarType::Float, kName,
                  ": a bfloat16 input needs float32 parameters");
  const int64_t channels = length_of_rows(kName, input);
  require_shape(kName, "the weight", weight, {channels});
  require_shape(kName, "the bias", bias, {channels});
  const Tensor rows = torch::stable::contiguous(input);
  Tensor output = empty_result_like(rows);
  if (rows.numel() == 0) return output;
  const Tensor factors = torch::stable::contiguous(weight), shifts = torch::stable::contiguous(bias);
  if (is_half) {
    normalise<cpu::Bfloat16, float>(rows, factors, shifts, epsilon, output, cpu::current_isa().layer_norm_bfloat16);
    return output;
  }
  with_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    normalise<T, T>(rows, factors, shifts, epsilon, output, cpu::current_kernels<T>().layer_norm);
  });
  return output;
}

Tensor softmax(const Tensor& logits) {
  constexpr const char* kName = "softmax";
  require_same_dtype(kName, {&logits});
  const int64_t length = length_of_rows(kName, logits);
  const Tensor rows = torch::stable::contiguous(logits);
  Tensor output = empty_result_like(rows);
  if (rows.numel() == 0) return output;
  with_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const T* from = data_of<T>(rows);
    T* to = mutable_data_of<T>(output);
    share_out(rows.numel() / length, 16 * length, [&](int64_t begin, int64_t end) {
      cpu::current_kernels<T>().softmax(from, to, length, begin, end);
    });
  });
  return output;
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def("layer_norm(Tensor input, Tensor weight, Tensor bias, float epsilon) -> Tensor");
  m.def("softmax(Tensor logits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&bevperception::layer_norm));
  m.impl("softmax", TORCH_BOX(&bevperception::softmax));
}
