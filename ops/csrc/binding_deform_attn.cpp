// deform_attn for PyTorch on the CPU; forward only, see bevperception/ops/fused_attention.py.
#include <limits>
#include <optional>

#include "binding.h"
#include "binding_levels.h"

namespace bevperception {
namespace {

constexpr const char* kName = "deform_attn";

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

struct RowArguments {
  Tensor value, offsets, logits, references;
  std::optional<Tensor> row_start, map_of;  // contiguous
  std::vector<Level> levels;
  std::vector<int32_t> anchor_of;
  MsDeformAttnSizes sizes;
  int64_t groups;

  int64_t rows() const { return logits.size(0); }
  template <class T>
  cpu::DeformAttn<T> problem() const {
    return {sizes,
            levels.data(),
            data_of<T>(value),
            data_of<T>(offsets),
            offsets.stride(0),
            data_of<T>(logits),
            logits.stride(0),
            data_of<T>(references),
            references.size(1),
            anchor_of.data(),
            groups,
            row_start ? data_of<int64_t>(*row_start) : nullptr,
            map_of ? data_of<int64_t>(*map_of) : nullptr};
  }
};

void require_indices(const char* name, const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1, kName, ": ", name,
                  " must be a row of int64");
  STD_TORCH_CHECK(count < 0 || tensor.size(0) == count, kName, ": ", name,
                  " has a length that does not fit the other arguments");
}

// Compressed rows, as they come from outside: checked whole, as the kernels trust them.
void require_rows(const RowArguments& arguments) {
  require_indices("row_start", *arguments.row_start, arguments.rows() + 1);
  require_indices("map_of", *arguments.map_of, -1);
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
  STD_TORCH_CHECK(value.dim() == 4 && offsets.dim() == 2 && logits.dim() == 2 && references.dim() == 3, kName,
                  ": value must have 4 dimensions, offsets and logits 2, references 3");
  STD_TORCH_CHECK(row_start.has_value() == map_of.has_value(), kName, ": row_start and map_of belong together");
  RowArguments arguments{torch::stable::contiguous(value),      with_contiguous_rows(offsets),
                         with_contiguous_rows(logits),          torch::stable::contiguous(references),
                         std::nullopt,                          std::nullopt,
                         levels_of(kName, shapes),              {anchors.begin(), anchors.end()},
                         {},                                    groups};
  const auto levels = static_cast<int64_t>(arguments.levels.size());
  const auto samples = static_cast<int64_t>(anchors.size());
  const int64_t cells = cells_of(arguments.levels), maps = value.size(0), heads = value.size(2);
  STD_TORCH_CHECK(samples % levels == 0, kName, ": anchors must have one entry a level and point");
  STD_TORCH_CHECK(groups > 0 && samples % groups == 0, kName, ": groups must divide levels * points");
  for (const int64_t anchor : anchors) {
    STD_TORCH_CHECK(anchor >= 0 && anchor < references.size(1), kName, ": anchors name a reference point ", anchor,
                    " of ", references.size(1));
  }
  STD_TORCH_CHECK(maps <= std::numeric_limits<int32_t>::max() && maps * cells <= std::numeric_limits<int32_t>::max(), kName, ": more than 2^31 - 1 cells");
  const int64_t rows = logits.size(0);
  require_shape(kName, "value", value, {maps, cells, heads, value.size(3)});
  require_shape(kName, "logits", logits, {rows, heads * samples});
  require_shape(kName, "offsets", offsets, {rows, heads * samples * 2});
  if (row_start) {
    arguments.row_start = torch::stable::contiguous(*row_start);
    arguments.map_of = torch::stable::contiguous(*map_of);
  } else {
    STD_TORCH_CHECK(rows == 0 || (maps > 0 && rows % maps == 0), kName, ": rows must be a multiple of the maps");
  }
  const int64_t entries = row_start ? arguments.map_of->numel() : rows;
  require_shape(kName, "references", references, {entries, references.size(1), 2});
  const int64_t queries = maps > 0 ? rows / maps : 0;
  arguments.sizes = {maps, cells, heads, value.size(3), queries, levels, samples / levels};
  if (row_start) require_rows(arguments);
  return arguments;
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& offsets, const Tensor& logits,
               const Tensor& references, std::vector<int64_t> anchors, int64_t groups,
               std::optional<Tensor> row_start, std::optional<Tensor> map_of) {
  const RowArguments arguments =
      arguments_of(value, shapes, offsets, logits, references, anchors, groups, row_start, map_of);
  const MsDeformAttnSizes& sizes = arguments.sizes;
  Tensor output = empty_result(value, {arguments.rows(), sizes.heads * sizes.channels});
  const int64_t work_of_row = sizes.heads * sizes.levels * sizes.points * (4 * sizes.channels + 32);
  with_dtype(value, [&](auto zero) {
    using T = decltype(zero);
    const auto problem = arguments.problem<T>();
    T* out = mutable_data_of<T>(output);
    share_out(arguments.rows(), work_of_row, [&](int64_t begin, int64_t end) {
      cpu::current_kernels<T>().deform_attn(problem, out, begin, end);
    });
  });
  return output;
}

}  // namespace
}  // namespace bevperception

STABLE_TORCH_LIBRARY_FRAGMENT(bevperception, m) {
  m.def(
      "deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor offsets, Tensor logits, Tensor references, "
      "SymInt[] anchors, SymInt groups, Tensor? row_start, Tensor? map_of) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("deform_attn", TORCH_BOX(&bevperception::forward));
}
