// The CUDA kernels' face: problems as pointers and sizes. Nothing here or below knows PyTorch; all pointers
// are the device's, tensors are contiguous where no stride is named. What samples a map (value, input,
// output) holds `number`s; positions, weights and all gradients of them are float, for kDouble double.
//
// Every function starts its kernels on a stream and returns null, or what CUDA says is wrong.
#pragma once

#include <stdint.h>

#include "../common/problems.h"

namespace bevperception::cuda {

enum class Number { kFloat, kDouble, kHalf, kBFloat16 };

// What travels with a launch by value.
constexpr int kMaxLevels = 64;
constexpr int kMaxSamples = 1024;

struct LevelTable {
  Level at[kMaxLevels];
};

struct MsDeformAttn : MsDeformAttnProblem<void> {
  Number number;
  LevelTable levels;
};

struct Dcnv3 : Dcnv3Problem<void> {
  Number number;
  double offset_scale;
};

// Entries and maps that row_start and map_of name beyond the last are left out.
struct DeformAttn : DeformAttnProblem<void> {
  Number number;
  LevelTable levels;
  int64_t rows, entries;
  uint16_t anchor_of[kMaxSamples];
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
