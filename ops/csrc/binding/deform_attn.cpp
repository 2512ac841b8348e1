// deform_attn for PyTorch on the CPU.
#include <optional>
#include <tuple>

#include "deform_attn.h"
#include "row_order.h"
#include "../schemas.h"

namespace bevperception {
namespace {

constexpr const char* kName = "deform_attn";

struct RowArguments : DeformAttnArguments {
  template <class T>
  cpu::DeformAttn<T> problem(const std::vector<int64_t>& order) const {
    return {{sizes, data_of<T>(value), data_of<T>(offsets), offsets.stride(0), data_of<T>(logits), logits.stride(0),
             data_of<T>(references), references.size(1), groups,
             row_start ? data_of<int64_t>(*row_start) : nullptr, map_of ? data_of<int64_t>(*map_of) : nullptr},
            levels.data(),
            anchor_of.data(),
            order.empty() ? nullptr : order.data()};
  }

  // By the first map that a row looks into, and by its first reference point there; empty: as they come.
  template <class T>
  std::vector<int64_t> row_order() const {
    const Tiles tiles(levels.front());
    if (references.size(1) == 0 || !tiles_pay(sizes, tiles, rows(), sizeof(T))) return {};
    const T* places = data_of<T>(references);
    const int64_t numbers_of_entry = references.size(1) * 2;
    const int64_t* start = row_start ? data_of<int64_t>(*row_start) : nullptr;
    return rows_by_key(rows(), sizes.batch * tiles.count(), [&](int64_t row) {
      const int64_t entry = start != nullptr ? start[row] : row;
      if (start != nullptr && entry == start[row + 1]) return int64_t(0);  // looks nowhere
      const int64_t map = start != nullptr ? data_of<int64_t>(*map_of)[entry] : row / sizes.queries;
      const T* place = places + entry * numbers_of_entry;
      return map * tiles.count() + tiles.at(place[0], place[1]);
    });
  }
};

// Compressed rows, as they come from outside: checked whole, as the kernels trust them.
void require_rows(const RowArguments& arguments) {
  const int64_t* start = data_of<int64_t>(*arguments.row_start);
  const int64_t* map = data_of<int64_t>(*arguments.map_of);
  const int64_t entries = arguments.map_of->size(0), rows = arguments.rows();
  STD_TORCH_CHECK(start[0] == 0 && start[rows] == entries, kName, ": row_start must run from 0 to the entries");
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(start[row] <= start[row + 1], kName, ": row_start must not decrease");
  }
  for (int64_t entry = 0; entry < entries; ++entry) {
    STD_TORCH_CHECK(map[entry] >= 0 && map[entry] < arguments.sizes.batch, kName, ": map_of names a map ",
                    map[entry], " of ", arguments.sizes.batch);
  }
}

RowArguments arguments_of(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& offsets,
                          const Tensor& logits, const Tensor& references, const std::vector<int64_t>& anchors,
                          int64_t groups, const std::optional<Tensor>& row_start,
                          const std::optional<Tensor>& map_of) {
  require_same_dtype(kName, {&value, &offsets, &logits, &references});
  const RowArguments arguments{DeformAttnArguments::of(kName, value, shapes, offsets, logits, references, anchors,
                                                       groups, row_start, map_of)};
  if (row_start) require_rows(arguments);
  return arguments;
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& offsets, const Tensor& logits,
               const Tensor& references, std::vector<int64_t> anchors, int64_t groups,
               std::optional<Tensor> row_start, std::optional<Tensor> map_of) {
  const RowArguments arguments =
      arguments_of(value, shapes, offsets, logits, references, anchors, groups, row_start, map_of);
  const MsDeformAttnSizes& sizes = arguments.sizes;
  const std::vector<int64_t> output_shape = {arguments.rows(), sizes.heads * sizes.channels};
  if (arguments.samples_nothing()) return zero_result(value, output_shape);
  Tensor output = empty_result(value, output_shape);
  const int64_t work_of_row = sizes.heads * sizes.levels * sizes.points * (4 * sizes.channels + 32);
  with_dtype(value, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<int64_t> order = arguments.row_order<T>();
    const auto problem = arguments.problem<T>(order);
    T* out = mutable_data_of<T>(output);
    share_out(arguments.rows(), work_of_row, [&](int64_t begin, int64_t end) {
      cpu::current_kernels<T>().deform_attn(problem, out, begin, end);
    });
  });
  return output;
}

// Entries sorted by their map, in the order of rows within one.
struct SortedEntries {
  SortedEntries(const RowArguments& arguments, const std::vector<int64_t>& order)
      : map_start(static_cast<size_t>(arguments.sizes.batch + 1)) {
    if (!arguments.row_start) {
      for (size_t map = 0; map < map_start.size(); ++map) map_start[map] = static_cast<int64_t>(map) * arguments.sizes.queries;
      entry_of = row_of = order;  // which keeps the rows of a map together
      return;
    }
    const int64_t* start = data_of<int64_t>(*arguments.row_start);
    const int64_t* map_of = data_of<int64_t>(*arguments.map_of);
    const int64_t entries = arguments.entries();
    for (int64_t entry = 0; entry < entries; ++entry) ++map_start[static_cast<size_t>(map_of[entry] + 1)];
    for (size_t map = 1; map < map_start.size(); ++map) map_start[map] += map_start[map - 1];
    entry_of.resize(static_cast<size_t>(entries));
    row_of.resize(static_cast<size_t>(entries));
    std::vector<int64_t> next(map_start.begin(), map_start.end() - 1);
    for (int64_t turn = 0; turn < arguments.rows(); ++turn) {
      const int64_t row = order.empty() ? turn : order[static_cast<size_t>(turn)];
      for (int64_t entry = start[row]; entry < start[row + 1]; ++entry) {
        const auto place = static_cast<size_t>(next[static_cast<size_t>(map_of[entry])]++);
        entry_of[place] = entry;
        row_of[place] = row;
      }
    }
  }

  cpu::EntriesByMap view() const {
    const bool listed = !entry_of.empty();
    return {map_start.data(), listed ? entry_of.data() : nullptr, listed ? row_of.data() : nullptr};
  }

  std::vector<int64_t> map_start, entry_of, row_of;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& output_gradient, const Tensor& value,
                                                    std::vector<int64_t> shapes, const Tensor& offsets,
                                                    const Tensor& logits, const Tensor& references,
                                                    std::vector<int64_t> anchors, int64_t groups,
                                                    std::optional<Tensor> row_start, std::optional<Tensor> map_of,
                                                    bool of_references) {
  const RowArguments arguments =
      arguments_of(value, shapes, offsets, logits, references, anchors, groups, row_start, map_of);
  const MsDeformAttnSizes& sizes = arguments.sizes;
  require_same_dtype(kName, {&value, &output_gradient});
  require_shape(kName, "the output's gradient", output_gradient, {arguments.rows(), sizes.heads * sizes.channels});
  const Tensor gradient = torch::stable::contiguous(output_gradient);
  const auto result = arguments.samples_nothing() ? zero_result : empty_result;
  Tensor value_gradient = result(value, {sizes.batch, sizes.cells, sizes.heads, sizes.channels});
  Tensor offsets_gradient = result(value, {arguments.rows(), offsets.size(1)});
  Tensor logits_gradient = result(value, {arguments.rows(), logits.size(1)});
  Tensor references_gradient = result(value, {of_references ? arguments.entries() : 0, references.size(1), 2});
  if (arguments.samples_nothing()) return {value_gradient, offsets_gradient, logits_gradient, references_gradient};
  Tensor weights = empty_result(value, {arguments.rows(), logits.size(1)});
  const int64_t work_of_head = sizes.levels * sizes.points * (4 * sizes.channels + 32);
  with_dtype(value, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<int64_t> order = arguments.row_order<T>();
    const auto problem = arguments.problem<T>(order);
    const SortedEntries sorted(arguments, order);
    const cpu::Kernels<T>& kernels = cpu::current_kernels<T>();
    const T* of_output = data_of<T>(gradient);
    const cpu::DeformAttnGradients<T> gradients{
        mutable_data_of<T>(offsets_gradient), mutable_data_of<T>(logits_gradient),
        of_references ? mutable_data_of<T>(references_gradient) : nullptr, mutable_data_of<T>(weights)};
    const auto bytes = static_cast<size_t>(references_gradient.numel()) * sizeof(T);
    if (bytes > 0) std::memset(gradients.of_references, 0, bytes);
    share_out(arguments.rows(), sizes.heads * work_of_head, [&](int64_t begin, int64_t end) {
      kernels.deform_attn_point_gradients(problem, of_output, gradients, begin, end);
    });
    const int64_t entries_of_map = sizes.batch > 0 ? arguments.entries() / sizes.batch + 1 : 1;
    T* value_gradient_data = mutable_data_of<T>(value_gradient);
    for_map_shares(value_gradient, sizes.heads, entries_of_map * work_of_head, [&](const cpu::MapShare& share) {
      kernels.deform_attn_value_gradient(problem, of_output, gradients.weights, sorted.view(),
                                         value_gradient_data, share);
    });
  });
  return {value_gradient, offsets_gradient, logits_gradient, references_gradient};
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def(BEV_DEFORM_ATTN_SCHEMA);
  m.def(BEV_DEFORM_ATTN_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("deform_attn", TORCH_BOX(&bevperception::forward));
  m.impl("deform_attn_backward", TORCH_BOX(&bevperception::backward));
}
