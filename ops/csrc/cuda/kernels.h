// The CUDA kernels' face: problems as pointers and sizes. Nothing here or below knows PyTorch; all pointers
// are the device's, tensors are contiguous where no stride is named. What samples a map (value, input,
// output) holds `number`s; positions, weights and all gradients of them are float, for kDouble double.
//
// Every function starts its kernels on a stream and returns null, or what CUDA says is wrong.
#pragma once

#include <stdint.h>

#include "../common/dcnv3.h"
#include "../common/ms_deform_attn.h"

namespace bevperception::cuda {

enum class Number { kFloat, kDouble, kHalf, kBFloat16 };

// What travels with a launch by value.
constexpr int kMaxLevels = 64;
constexpr int kMaxSamples = 1024;

struct LevelTable {
  Level at[kMaxLevels];
};

struct MsDeformAttn {
  Number number;
  MsDeformAttnSizes sizes;
  LevelTable levels;
  const void* value;      // (batch, cells, heads, channels)
  const void* locations;  // (batch, queries, heads, levels, points, 2)
  const void* weights;    // (batch, queries, heads, levels, points)
};

struct Dcnv3 {
  Number number;
  Dcnv3Sizes sizes;
  double offset_scale;
  const void* input;   // (batch, height, width, groups, channels)
  const void* offset;  // (batch, out_height, out_width, groups, points, 2)
  const void* mask;    // (batch, out_height, out_width, groups, points)
};

// See cpu::DeformAttn. Entries and maps that row_start and map_of name beyond the last are left out.
struct DeformAttn {
  Number number;
  MsDeformAttnSizes sizes;  // batch: maps; queries: rows of a map, where row_start is null
  LevelTable levels;
  const void* value;    // (maps, cells, heads, channels)
  const void* offsets;  // (rows, heads, levels, points, 2) in cells; a row is contiguous
  const void* logits;   // (rows, heads, levels, points); a row is contiguous
  const void* references;  // (entries, anchors, 2)
  int64_t rows, entries, offsets_stride, logits_stride, anchors, groups;
  uint16_t anchor_of[kMaxSamples];
  const int64_t* row_start;  // (rows + 1) or null
  const int64_t* map_of;     // (entries), null with row_start
};

// Where the gradient of a map goes. Without segments it is added up in the order in which threads come, which
// differs from run to run; with them in a fixed order.
struct MapGradient {
  void* total;        // zeros before
  void* segments;     // (count, the map's shape) zeros before, or null
  int64_t count;
};

const char* ms_deform_attn(const MsDeformAttn& problem, void* output, void* stream);
const char* ms_deform_attn_backward(const MsDeformAttn& problem, const void* output_gradient,
                                    const MapGradient& value_gradient, void* locations_gradient,
                                    void* weights_gradient, void* stream);

const char* dcnv3(const Dcnv3& problem, void* output, void* stream);
const char* dcnv3_backward(const Dcnv3& problem, const void* output_gradient, const MapGradient& input_gradient,
                           void* offset_gradient, void* mask_gradient, void* stream);

const char* deform_attn(const DeformAttn& problem, void* output, void* stream);
// references_gradient: zeros before, or null.
const char* deform_attn_backward(const DeformAttn& problem, const void* output_gradient, void* value_gradient,
                                 void* offsets_gradient, void* logits_gradient, void* references_gradient,
                                 void* stream);

// Architectures that the kernels were compiled for, such as "80 90".
const char* architectures();

}  // namespace bevperception::cuda
