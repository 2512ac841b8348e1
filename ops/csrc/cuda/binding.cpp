// The CUDA kernels for PyTorch. With BEV_EMULATOR the same for CPU tensors, in a library of its own name.
#include <tuple>

#if defined(BEV_EMULATOR)
#define BEV_LIBRARY bevperception_emulated
#define BEV_KEY CPU
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define BEV_LIBRARY bevperception
#define BEV_KEY CUDA
#endif

#include "../binding/dcnv3.h"
#include "../binding/deform_attn.h"
#include "../binding/ms_deform_attn.h"
#include "../schemas.h"
#include "kernels.h"

namespace bevperception::cuda {
namespace {

// Parts in which the map's gradient is added up where the order is to be fixed.
constexpr int64_t kSegments = 8;

#if defined(BEV_EMULATOR)
struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// The tensor's device is the current one while this lives.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  // By name, as a build of PyTorch without CUDA, into which this library loads too, does not have it; and from
  // the library that has it, as Python loads libraries for themselves.
  void* stream() const {
    using Get = int32_t (*)(int32_t, void**);
    static const auto get = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr
                                : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(get != nullptr, "this PyTorch has no CUDA streams");
    void* stream = nullptr;
    STD_TORCH_CHECK(get(index_, &stream) == 0, "PyTorch does not give the current CUDA stream");
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void require_started(const char* op, const char* problem) {
  STD_TORCH_CHECK(problem == nullptr, op, ": ", problem);
}

Number number_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Number::kFloat;
    case ScalarType::Double:
      return Number::kDouble;
    case ScalarType::Half:
      return Number::kHalf;
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": maps must be float16, bfloat16, float32 or float64");
  }
  return Number::kFloat;
}

ScalarType real_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels would read another device's memory at this one's addresses.
void require_one_device(const char* op, const Tensor& map, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->device() == map.device(), op, ": all tensors must be on one device");
  }
}

void require_real(const char* op, const Tensor& map, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == real_of(map), op,
                    ": positions and weights must be float64 with maps of float64, else float32");
  }
  require_one_device(op, map, tensors);
}

Tensor gradient_of_output(const char* op, const Tensor& gradient, const Tensor& map,
                          std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(gradient.scalar_type() == map.scalar_type(), op, ": the output's gradient must have its dtype");
  require_one_device(op, map, {&gradient});
  require_shape(op, "the output's gradient", gradient, shape);
  return torch::stable::contiguous(gradient);
}

// Nothing is written to results of nothing (samples_nothing): they are zero from the start.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, bool is_zero) {
  const std::vector<int64_t> sizes(shape);
  return is_zero ? torch::stable::new_zeros(like, sizes) : torch::stable::new_empty(like, sizes);
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_zeros(like, sizes, real_of(like));
}

// Gradient of a map of these sizes, and if the order is to be fixed the segments that make it up.
struct MapGradientTensors {
  Tensor total;
  std::optional<Tensor> segments;

  MapGradientTensors(const Tensor& like, std::vector<int64_t> sizes, bool in_order) : total(zeros(like, sizes)) {
    if (!in_order) return;
    sizes.insert(sizes.begin(), kSegments);
    segments = zeros(like, sizes);
  }
  MapGradient pointers() const {
    return {total.data_ptr(), segments ? segments->data_ptr() : nullptr, kSegments};
  }
};

LevelTable table_of(const char* op, const std::vector<Level>& levels) {
  STD_TORCH_CHECK(levels.size() <= kMaxLevels, op, ": more than ", kMaxLevels, " levels");
  LevelTable table = {};
  std::copy(levels.begin(), levels.end(), table.at);
  return table;
}

// So that tasks of a batch element can be counted in 32 bits, and samples in an int.
void require_counts(const char* op, int64_t rows, int64_t heads, int64_t samples) {
  STD_TORCH_CHECK(rows * heads <= std::numeric_limits<int32_t>::max() && samples <= 1 << 20, op,
                  ": more than 2^31 - 1 queries times heads, or more than 2^20 points of a query");
}

namespace attention {
constexpr const char* kName = "ms_deform_attn";

MsDeformAttn problem_of(const MsDeformAttnArguments& arguments) {
  const auto& sizes = arguments.sizes;
  require_real(kName, arguments.value, {&arguments.locations, &arguments.weights});
  require_counts(kName, sizes.queries, sizes.heads, sizes.levels * sizes.points);
  return {{sizes, arguments.value.data_ptr(), arguments.locations.data_ptr(), arguments.weights.data_ptr()},
          number_of(kName, arguments.value), table_of(kName, arguments.levels)};
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const auto arguments = MsDeformAttnArguments::of(kName, value, shapes, locations, weights);
  const MsDeformAttn problem = problem_of(arguments);
  const Device device(value);
  const bool is_zero = arguments.samples_nothing();
  Tensor output = empty(value, {problem.sizes.batch, problem.sizes.queries, problem.sizes.heads * problem.sizes.channels},
                        is_zero);
  if (is_zero) return output;
  require_started(kName, ms_deform_attn(problem, output.data_ptr(), device.stream()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& value,
                                            const std::vector<int64_t>& shapes, const Tensor& locations,
                                            const Tensor& weights, bool in_order) {
  const auto arguments = MsDeformAttnArguments::of(kName, value, shapes, locations, weights);
  const MsDeformAttn problem = problem_of(arguments);
  const MsDeformAttnSizes& sizes = problem.sizes;
  const Device device(value);
  const Tensor gradient =
      gradient_of_output(kName, output_gradient, value, {sizes.batch, sizes.queries, sizes.heads * sizes.channels});
  const MapGradientTensors value_gradient(value, {sizes.batch, sizes.cells, sizes.heads, sizes.channels}, in_order);
  const bool is_zero = arguments.samples_nothing();
  Tensor of_locations =
      empty(locations, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2}, is_zero);
  Tensor of_weights = empty(weights, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points}, is_zero);
  if (is_zero) return {value_gradient.total, of_locations, of_weights};
  require_started(kName, ms_deform_attn_backward(problem, gradient.data_ptr(), value_gradient.pointers(),
                                                 of_locations.data_ptr(), of_weights.data_ptr(), device.stream()));
  return {value_gradient.total, of_locations, of_weights};
}

std::tuple<Tensor, Tensor, Tensor> backward_at_once(const Tensor& output_gradient, const Tensor& value,
                                                    std::vector<int64_t> shapes, const Tensor& locations,
                                                    const Tensor& weights) {
  return backward(output_gradient, value, shapes, locations, weights, false);
}

std::tuple<Tensor, Tensor, Tensor> backward_in_order(const Tensor& output_gradient, const Tensor& value,
                                                     std::vector<int64_t> shapes, const Tensor& locations,
                                                     const Tensor& weights) {
  return backward(output_gradient, value, shapes, locations, weights, true);
}
}  // namespace attention

namespace convolution {
constexpr const char* kName = "dcnv3";

Dcnv3 problem_of(const Dcnv3Arguments& arguments) {
  const Dcnv3Sizes& sizes = arguments.sizes;
  require_real(kName, arguments.input, {&arguments.offset, &arguments.mask});
  require_counts(kName, sizes.out_height * sizes.out_width, sizes.groups, sizes.points());
  return {{sizes, arguments.input.data_ptr(), arguments.offset.data_ptr(), arguments.mask.data_ptr()},
          number_of(kName, arguments.input), arguments.offset_scale};
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& mask, int64_t kernel_size, int64_t stride,
               int64_t padding, int64_t dilation, int64_t groups, double offset_scale, bool remove_center) {
  const auto arguments = Dcnv3Arguments::of(
      kName, input, offset, mask, {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center});
  const Dcnv3 problem = problem_of(arguments);
  const Device device(input);
  const bool is_zero = arguments.samples_nothing();
  Tensor output = empty(
      input, {problem.sizes.batch, problem.sizes.out_height, problem.sizes.out_width, input.size(3)}, is_zero);
  if (is_zero) return output;
  require_started(kName, dcnv3(problem, output.data_ptr(), device.stream()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& input,
                                            const Tensor& offset, const Tensor& mask,
                                            const Dcnv3Settings& settings, bool in_order) {
  const auto arguments = Dcnv3Arguments::of(kName, input, offset, mask, settings);
  const Dcnv3 problem = problem_of(arguments);
  const Dcnv3Sizes& sizes = problem.sizes;
  const Device device(input);
  const Tensor gradient = gradient_of_output(kName, output_gradient, input,
                                             {sizes.batch, sizes.out_height, sizes.out_width, input.size(3)});
  const MapGradientTensors of_input(input, {sizes.batch, sizes.height, sizes.width, input.size(3)}, in_order);
  const bool is_zero = arguments.samples_nothing();
  Tensor of_offset = empty(offset, {sizes.batch, sizes.out_height, sizes.out_width, offset.size(3)}, is_zero);
  Tensor of_mask = empty(mask, {sizes.batch, sizes.out_height, sizes.out_width, mask.size(3)}, is_zero);
  if (is_zero) return {of_input.total, of_offset, of_mask};
  require_started(kName, dcnv3_backward(problem, gradient.data_ptr(), of_input.pointers(), of_offset.data_ptr(),
                                        of_mask.data_ptr(), device.stream()));
  return {of_input.total, of_offset, of_mask};
}

std::tuple<Tensor, Tensor, Tensor> backward_at_once(const Tensor& output_gradient, const Tensor& input,
                                                    const Tensor& offset, const Tensor& mask, int64_t kernel_size,
                                                    int64_t stride, int64_t padding, int64_t dilation,
                                                    int64_t groups, double offset_scale, bool remove_center) {
  return backward(output_gradient, input, offset, mask,
                  {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center}, false);
}

std::tuple<Tensor, Tensor, Tensor> backward_in_order(const Tensor& output_gradient, const Tensor& input,
                                                     const Tensor& offset, const Tensor& mask, int64_t kernel_size,
                                                     int64_t stride, int64_t padding, int64_t dilation,
                                                     int64_t groups, double offset_scale, bool remove_center) {
  return backward(output_gradient, input, offset, mask,
                  {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center}, true);
}
}  // namespace convolution

namespace rows {
constexpr const char* kName = "deform_attn";

DeformAttn problem_of(const DeformAttnArguments& arguments) {
  const MsDeformAttnSizes& sizes = arguments.sizes;
  require_real(kName, arguments.value, {&arguments.offsets, &arguments.logits, &arguments.references});
  require_counts(kName, arguments.rows(), sizes.heads, sizes.levels * sizes.points);
  STD_TORCH_CHECK(arguments.anchor_of.size() <= kMaxSamples, kName, ": more than ", kMaxSamples,
                  " points of a query");
  DeformAttn problem = {};
  problem.number = number_of(kName, arguments.value);
  problem.sizes = sizes;
  problem.levels = table_of(kName, arguments.levels);
  problem.value = arguments.value.data_ptr();
  problem.offsets = arguments.offsets.data_ptr();
  problem.logits = arguments.logits.data_ptr();
  problem.references = arguments.references.data_ptr();
  problem.rows = arguments.rows();
  problem.entries = arguments.entries();
  problem.offsets_stride = arguments.offsets.stride(0);
  problem.logits_stride = arguments.logits.stride(0);
  problem.anchors = arguments.references.size(1);
  problem.groups = arguments.groups;
  std::copy(arguments.anchor_of.begin(), arguments.anchor_of.end(), problem.anchor_of);
  if (arguments.row_start) {
    require_one_device(kName, arguments.value, {&*arguments.row_start, &*arguments.map_of});
    problem.row_start = data_of<int64_t>(*arguments.row_start);
    problem.map_of = data_of<int64_t>(*arguments.map_of);
  }
  return problem;
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& offsets, const Tensor& logits,
               const Tensor& references, std::vector<int64_t> anchors, int64_t groups,
               std::optional<Tensor> row_start, std::optional<Tensor> map_of) {
  const auto arguments = DeformAttnArguments::of(kName, value, shapes, offsets, logits, references, anchors, groups,
                                                 row_start, map_of);
  const DeformAttn problem = problem_of(arguments);
  const Device device(value);
  const bool is_zero = arguments.samples_nothing();
  Tensor output = empty(value, {problem.rows, problem.sizes.heads * problem.sizes.channels}, is_zero);
  if (is_zero) return output;
  require_started(kName, deform_attn(problem, output.data_ptr(), device.stream()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& value,
                                                    std::vector<int64_t> shapes, const Tensor& offsets,
                                                    const Tensor& logits, const Tensor& references,
                                                    std::vector<int64_t> anchors, int64_t groups,
                                                    std::optional<Tensor> row_start, std::optional<Tensor> map_of,
                                                    bool of_references) {
  const auto arguments = DeformAttnArguments::of(kName, value, shapes, offsets, logits, references, anchors, groups,
                                                 row_start, map_of);
  const DeformAttn problem = problem_of(arguments);
  const MsDeformAttnSizes& sizes = problem.sizes;
  const Device device(value);
  const Tensor gradient =
      gradient_of_output(kName, output_gradient, value, {problem.rows, sizes.heads * sizes.channels});
  Tensor value_gradient = zeros(value, {sizes.batch, sizes.cells, sizes.heads, sizes.channels});
  const bool is_zero = arguments.samples_nothing();
  Tensor of_offsets = empty(offsets, {problem.rows, offsets.size(1)}, is_zero);
  Tensor of_logits = empty(logits, {problem.rows, logits.size(1)}, is_zero);
  Tensor found = zeros(references, {of_references ? problem.entries : 0, problem.anchors, 2});
  if (is_zero) return {value_gradient, of_offsets, of_logits, found};
  require_started(kName, deform_attn_backward(problem, gradient.data_ptr(), value_gradient.data_ptr(),
                                              of_offsets.data_ptr(), of_logits.data_ptr(),
                                              of_references ? found.data_ptr() : nullptr, device.stream()));
  return {value_gradient, of_offsets, of_logits, found};
}
}  // namespace rows

std::string cuda_architectures() { return architectures(); }

}  // namespace
}  // namespace bevperception::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(BEV_LIBRARY, m) {
#if defined(BEV_EMULATOR)
  m.def(BEV_MS_DEFORM_ATTN_SCHEMA);
  m.def(BEV_MS_DEFORM_ATTN_BACKWARD_SCHEMA(""));
  m.def(BEV_DCNV3_SCHEMA);
  m.def(BEV_DCNV3_BACKWARD_SCHEMA(""));
  m.def(BEV_DEFORM_ATTN_SCHEMA);
  m.def(BEV_DEFORM_ATTN_BACKWARD_SCHEMA);
#endif
  m.def("cuda_architectures() -> str");
  m.def(BEV_MS_DEFORM_ATTN_BACKWARD_SCHEMA("_in_order"));
  m.def(BEV_DCNV3_BACKWARD_SCHEMA("_in_order"));
}

STABLE_TORCH_LIBRARY_IMPL(BEV_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&bevperception::cuda::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(BEV_LIBRARY, BEV_KEY, m) {
  namespace cuda = bevperception::cuda;
  m.impl("ms_deform_attn", TORCH_BOX(&cuda::attention::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&cuda::attention::backward_at_once));
  m.impl("ms_deform_attn_backward_in_order", TORCH_BOX(&cuda::attention::backward_in_order));
  m.impl("dcnv3", TORCH_BOX(&cuda::convolution::forward));
  m.impl("dcnv3_backward", TORCH_BOX(&cuda::convolution::backward_at_once));
  m.impl("dcnv3_backward_in_order", TORCH_BOX(&cuda::convolution::backward_in_order));
  m.impl("deform_attn", TORCH_BOX(&cuda::rows::forward));
  m.impl("deform_attn_backward", TORCH_BOX(&cuda::rows::backward));
}
