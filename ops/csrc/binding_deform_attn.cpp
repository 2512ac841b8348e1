// deform_attn for PyTorch on the CPU; forward only, see bevperception/ops/fused_attention.py.
#include <optional>

#include "binding_deform_attn.h"
#include "schemas.h"

namespace bevperception {
namespace {

constexpr const char* kName = "deform_attn";

struct RowArguments : DeformAttnArguments {
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
  m.def(BEV_DEFORM_ATTN_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(bevperception, CPU, m) {
  m.impl("deform_attn", TORCH_BOX(&bevperception::forward));
}
