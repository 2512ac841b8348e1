// dcnv3 for PyTorch on the CPU.
#include <tuple>

#include "dcnv3.h"
#include "../schemas.h"

namespace bevperception {
namespace {

constexpr const char* kName = "dcnv3";

struct Arguments : Dcnv3Arguments {
  template <class T>
  cpu::Dcnv3<T> problem() const {
    return {{sizes, data_of<T>(input), data_of<T>(offset), data_of<T>(mask)}, static_cast<T>(offset_scale)};
  }
  int64_t rows() const { return sizes.batch * sizes.out_height; }
  int64_t work_of_group() const { return sizes.out_width * sizes.points() * (4 * sizes.channels + 16); }
  int64_t work_of_row() const { return sizes.groups * work_of_group(); }

  // Bands of output rows to share out: several a thread where they need not be narrow for it, as a band costs the
  // rows that it shares with its neighbours again.
  int64_t bands_of_image() const {
    constexpr int64_t kRows = 24;
    const int64_t threads = torch::stable::get_num_threads(), images = std::max<int64_t>(1, sizes.batch);
    const int64_t wanted = (4 * threads + images - 1) / images, least = (threads + images - 1) / images;
    const int64_t bands = std::max(least, std::min(wanted, sizes.out_height / kRows));
    return std::max<int64_t>(1, std::min(bands, sizes.out_height));
  }
};

Arguments arguments_of(const Tensor& input, const Tensor& offset, const Tensor& mask,
                       const Dcnv3Settings& settings) {
  require_same_dtype(kName, {&input, &offset, &mask});
  return {Dcnv3Arguments::of(kName, input, offset, mask, settings)};
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& mask, int64_t kernel_size, int64_t stride,
               int64_t padding, int64_t dilation, int64_t groups, double offset_scale, bool remove_center) {
  const Arguments arguments = arguments_of(
      input, offset, mask, {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center});
  const Dcnv3Sizes& sizes = arguments.sizes;
  const std::vector<int64_t> output_shape = {sizes.batch, sizes.out_height, sizes.out_width, input.size(3)};
  if (arguments.samples_nothing()) return zero_result(input, output_shape);
  Tensor output = empty_result(input, output_shape);
  with_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto problem = arguments.problem<T>();
    T* out = mutable_data_of<T>(output);
    const int64_t bands = arguments.bands_of_image();
    const int64_t work = sizes.out_height / bands * arguments.work_of_row();
    share_out(sizes.batch * bands, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t band = i % bands;
        cpu::current_kernels<T>().dcnv3(problem, out, i / bands, band * sizes.out_height / bands,
                                        (band + 1) * sizes.out_height / bands);
      }
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& input,
                                            const Tensor& offset, const Tensor& mask, int64_t kernel_size,
                                            int64_t stride, int64_t padding, int64_t dilation, int64_t groups,
                                            double offset_scale, bool remove_center) {
  const Arguments arguments = arguments_of(
      input, offset, mask, {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center});
  const Dcnv3Sizes& sizes = arguments.sizes;
  require_same_dtype(kName, {&input, &output_gradient});
  require_shape(kName, "the output's gradient", output_gradient,
                {sizes.batch, sizes.out_height, sizes.out_width, input.size(3)});
  const Tensor gradient = torch::stable::contiguous(output_gradient);
  const auto result = arguments.samples_nothing() ? zero_result : empty_result;
  Tensor input_gradient = result(input, {sizes.batch, sizes.height, sizes.width, input.size(3)});
  Tensor offset_gradient = result(input, {sizes.batch, sizes.out_height, sizes.out_width, offset.size(3)});
  Tensor mask_gradient = result(input, {sizes.batch, sizes.out_height, sizes.out_width, mask.size(3)});
  if (arguments.samples_nothing()) return {input_gradient, offset_gradient, mask_gradient};
  with_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto problem = arguments.problem<T>();
    const cpu::Kernels<T>& kernels = cpu::current_kernels<T>();
    const T* of_output = data_of<T>(gradient);
    T* of_offset = mutable_data_of<T>(offset_gradient);
    T* of_mask = mutable_data_of<T>(mask_gradient);
    T* of_input = mutable_data_of<T>(input_gradient);
    share_out(arguments.rows(), arguments.work_of_row(), [&](int64_t begin, int64_t end) {
      kernels.dcnv3_point_gradients(problem, of_output, of_offset, of_mask, begin, end);
    });
    for_map_shares(input_gradient, sizes.groups, sizes.out_height * arguments.work_of_group(), [&](const cpu::MapShare& share) {
      kernels.dcnv3_input_gradient(problem, of_output, of_input, share);
    });
  });
  return {input_gradient, offset_gradient, mask_gradient};
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def(BEV_DCNV3_SCHEMA);
  m.def(BEV_DCNV3_BACKWARD_SCHEMA(""));
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("dcnv3", TORCH_BOX(&bevperception::forward));
  m.impl("dcnv3_backward", TORCH_BOX(&bevperception::backward));
}
