// Arguments of deform_attn, checked; for the CPU and for CUDA.
#pragma once

#include <limits>
#include <optional>

#include "levels.h"

namespace bevperception {

inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

struct DeformAttnArguments {
  Tensor value, offsets, logits, references;
  std::optional<Tensor> row_start, map_of;  // contiguous
  std::vector<Level> levels;
  std::vector<int32_t> anchor_of;
  MsDeformAttnSizes sizes;
  int64_t groups;

  int64_t rows() const { return logits.size(0); }
  int64_t entries() const { return references.size(0); }

  // Whether nothing is sampled: then the result and all gradients are zero.
  bool samples_nothing() const { return value.numel() == 0 || logits.numel() == 0 || entries() == 0; }

  static DeformAttnArguments of(const char* op, const Tensor& value, const std::vector<int64_t>& shapes,
                                const Tensor& offsets, const Tensor& logits, const Tensor& references,
                                const std::vector<int64_t>& anchors, int64_t groups,
                                const std::optional<Tensor>& row_start, const std::optional<Tensor>& map_of) {
    STD_TORCH_CHECK(value.dim() == 4 && offsets.dim() == 2 && logits.dim() == 2 && references.dim() == 3, op,
                    ": value must have 4 dimensions, offsets and logits 2, references 3");
    STD_TORCH_CHECK(row_start.has_value() == map_of.has_value(), op, ": row_start and map_of belong together");
    DeformAttnArguments arguments{torch::stable::contiguous(value),      with_contiguous_rows(offsets),
                           with_contiguous_rows(logits),          torch::stable::contiguous(references),
                           std::nullopt,                          std::nullopt,
                           levels_of(op, shapes),              {anchors.begin(), anchors.end()},
                           {},                                    groups};
    const auto levels = static_cast<int64_t>(arguments.levels.size());
    const auto samples = static_cast<int64_t>(anchors.size());
    const int64_t cells = cells_of(arguments.levels), maps = value.size(0), heads = value.size(2);
    STD_TORCH_CHECK(samples % levels == 0, op, ": anchors must have one entry a level and point");
    STD_TORCH_CHECK(groups > 0 && samples % groups == 0, op, ": groups must divide levels * points");
    for (const int64_t anchor : anchors) {
      STD_TORCH_CHECK(anchor >= 0 && anchor < references.size(1), op, ": anchors name a reference point ", anchor,
                      " of ", references.size(1));
    }
    STD_TORCH_CHECK(maps <= std::numeric_limits<int32_t>::max() && maps * cells <= std::numeric_limits<int32_t>::max(), op, ": more than 2^31 - 1 cells");
    const int64_t rows = logits.size(0);
    require_shape(op, "value", value, {maps, cells, heads, value.size(3)});
    require_shape(op, "logits", logits, {rows, heads * samples});
    require_shape(op, "offsets", offsets, {rows, heads * samples * 2});
    if (row_start) {
      require_indices(op, "row_start", *row_start, rows + 1);
      require_indices(op, "map_of", *map_of, -1);
      arguments.row_start = torch::stable::contiguous(*row_start);
      arguments.map_of = torch::stable::contiguous(*map_of);
    } else {
      STD_TORCH_CHECK(rows == 0 || (maps > 0 && rows % maps == 0), op, ": rows must be a multiple of the maps");
    }
    const int64_t entries = row_start ? arguments.map_of->numel() : rows;
    require_shape(op, "references", references, {entries, references.size(1), 2});
    const int64_t queries = maps > 0 ? rows / maps : 0;
    arguments.sizes = {maps, cells, heads, value.size(3), queries, levels, samples / levels};
    return arguments;
  }

 private:
  static void require_indices(const char* op, const char* name, const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1, op, ": ", name,
                    " must be a row of int64");
    STD_TORCH_CHECK(count < 0 || tensor.size(0) == count, op, ": ", name,
                    " has a length that does not fit the other arguments");
  }
};

}  // namespace bevperception
