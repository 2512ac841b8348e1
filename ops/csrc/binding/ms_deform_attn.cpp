// ms_deform_attn for PyTorch on the CPU.
// The model calls deform_attn, which makes locations and weights itself. This operator stands for code that brings its
// own, such as published Deformable-DETR models, and for comparisons with their kernels.
#include <tuple>

#include "tensors.h"
#include "ms_deform_attn.h"
#include "row_order.h"
#include "../schemas.h"

namespace bevperception {
namespace {

constexpr const char* kName = "ms_deform_attn";

struct Arguments : MsDeformAttnArguments {
  template <class T>
  cpu::MsDeformAttn<T> problem(const std::vector<int64_t>& order) const {
    return {{sizes, data_of<T>(value), data_of<T>(locations), data_of<T>(weights)},
            levels.data(),
            order.empty() ? nullptr : order.data()};
  }

  // By batch element and by where the row's first point lies; empty: as they come.
  template <class T>
  std::vector<int64_t> row_order() const {
    const Tiles tiles(levels.front());
    const int64_t numbers_of_row = sizes.heads * sizes.levels * sizes.points * 2;
    if (numbers_of_row == 0 || !tiles_pay(sizes, tiles, rows(), sizeof(T))) return {};
    const T* first = data_of<T>(locations);
    return rows_by_key(rows(), sizes.batch * tiles.count(), [&](int64_t row) {
      const T* place = first + row * numbers_of_row;
      return row / sizes.queries * tiles.count() + tiles.at(place[0], place[1]);
    });
  }

  int64_t rows() const { return sizes.batch * sizes.queries; }
  int64_t work_of_head() const { return sizes.levels * sizes.points * (4 * sizes.channels + 16); }
  int64_t work_of_row() const { return sizes.heads * work_of_head(); }
};

Arguments arguments_of(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
                       const Tensor& weights) {
  require_same_dtype(kName, {&value, &locations, &weights});
  return {MsDeformAttnArguments::of(kName, value, shapes, locations, weights)};
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Arguments arguments = arguments_of(value, shapes, locations, weights);
  const MsDeformAttnSizes& sizes = arguments.sizes;
  const std::vector<int64_t> output_shape = {sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  if (arguments.samples_nothing()) return zero_result(value, output_shape);
  Tensor output = empty_result(value, output_shape);
  with_dtype(value, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<int64_t> order = arguments.row_order<T>();
    const auto problem = arguments.problem<T>(order);
    T* out = mutable_data_of<T>(output);
    share_out(arguments.rows(), arguments.work_of_row(), [&](int64_t begin, int64_t end) {
      cpu::current_kernels<T>().ms_deform_attn(problem, out, begin, end);
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& value,
                                            std::vector<int64_t> shapes, const Tensor& locations,
                                            const Tensor& weights) {
  const Arguments arguments = arguments_of(value, shapes, locations, weights);
  const MsDeformAttnSizes& sizes = arguments.sizes;
  require_same_dtype(kName, {&value, &output_gradient});
  require_shape(kName, "the output's gradient", output_gradient,
                {sizes.batch, sizes.queries, sizes.heads * sizes.channels});
  const Tensor gradient = torch::stable::contiguous(output_gradient);
  const auto result = arguments.samples_nothing() ? zero_result : empty_result;
  Tensor value_gradient = result(value, {sizes.batch, sizes.cells, sizes.heads, sizes.channels});
  Tensor locations_gradient = result(
      value, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
  Tensor weights_gradient = result(value, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points});
  if (arguments.samples_nothing()) return {value_gradient, locations_gradient, weights_gradient};
  with_dtype(value, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<int64_t> order = arguments.row_order<T>();
    const auto problem = arguments.problem<T>(order);
    const cpu::Kernels<T>& kernels = cpu::current_kernels<T>();
    const T* of_output = data_of<T>(gradient);
    T* of_locations = mutable_data_of<T>(locations_gradient);
    T* of_weights = mutable_data_of<T>(weights_gradient);
    T* value_gradient_data = mutable_data_of<T>(value_gradient);
    share_out(arguments.rows(), arguments.work_of_row(), [&](int64_t begin, int64_t end) {
      kernels.ms_deform_attn_point_gradients(problem, of_output, of_locations, of_weights, begin, end);
    });
    for_map_shares(value_gradient, sizes.heads, sizes.queries * arguments.work_of_head(), [&](const cpu::MapShare& share) {
      kernels.ms_deform_attn_value_gradient(problem, of_output, value_gradient_data, share);
    });
  });
  return {value_gradient, locations_gradient, weights_gradient};
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def(BEV_MS_DEFORM_ATTN_SCHEMA);
  m.def(BEV_MS_DEFORM_ATTN_BACKWARD_SCHEMA(""));
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&bevperception::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&bevperception::backward));
}
