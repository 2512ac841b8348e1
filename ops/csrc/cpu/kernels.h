// The CPU kernels' face: problems as pointers and sizes, and one table of functions for each
// instruction set. Nothing here or below knows PyTorch; all tensors are contiguous.
#pragma once

#include <stdint.h>

#include "../common/dcnv3.h"
#include "../common/ms_deform_attn.h"

namespace bevperception::cpu {

template <class T>
struct MsDeformAttn {
  MsDeformAttnSizes sizes;
  const Level* levels;
  const T* value;      // (batch, cells, heads, channels)
  const T* locations;  // (batch, queries, heads, levels, points, 2)
  const T* weights;    // (batch, queries, heads, levels, points)
  const int64_t* row_order;  // the rows (batch element, query) as they are worked on; null: as they come
};

// Rows, one a query, look into maps through entries (row, map). A row's offsets and logits hold for all
// of its entries; an entry has reference points of its own.
template <class T>
struct DeformAttn {
  MsDeformAttnSizes sizes;  // batch: maps; queries: rows of a map, where row_start is null
  const Level* levels;
  const T* value;  // (maps, cells, heads, channels)
  const T* offsets;  // (rows, heads, levels, points, 2) in cells; a row is contiguous
  int64_t offsets_stride;
  const T* logits;  // (rows, heads, levels, points); a row is contiguous
  int64_t logits_stride;
  const T* references;  // (entries, anchors, 2)
  int64_t anchors;
  const int32_t* anchor_of;  // (levels, points): the reference point that a sampling point starts from
  int64_t groups;            // softmax within each of so many equal parts of (levels, points)
  const int64_t* row_start;  // (rows + 1) into the entries; null: one entry a row, maps one after another
  const int64_t* map_of;     // (entries); null with row_start
  const int64_t* row_order;  // the rows as they are worked on; null: as they come
};

// What the gradients of deform_attn go into, apart from the maps'.
template <class T>
struct DeformAttnGradients {
  T* of_offsets;     // (rows, heads, levels, points, 2)
  T* of_logits;      // (rows, heads, levels, points)
  T* of_references;  // (entries, anchors, 2), zeros before; null: not wanted
  T* weights;        // (rows, heads, levels, points): left for the maps' gradient
};

// The entries in the order of their maps.
struct EntriesByMap {
  const int64_t* map_start;  // (maps + 1) into the two below
  const int64_t* entry_of;   // null with row_of: entries and rows in order
  const int64_t* row_of;
};

template <class T>
struct Dcnv3 {
  Dcnv3Sizes sizes;
  T offset_scale;
  const T* input;   // (batch, height, width, groups, channels)
  const T* offset;  // (batch, out_height, out_width, groups, points, 2)
  const T* mask;    // (batch, out_height, out_width, groups, points)
};

struct Bfloat16 {
  uint16_t bits;
};

// Where a tile of 4x4 outputs begins.
struct WinogradTile {
  int64_t image, row, column;
};

// A 3x3 convolution of stride 1, with zeros around the map.
struct Convolution3x3 {
  int64_t batch, height, width, inputs, outputs;  // channels: multiples of 32
  const float* input;   // (batch, height, width, inputs)
  const float* weight;  // (outputs, inputs, 3, 3)
  const float* bias;    // (outputs)
  bool relu;
  int64_t kernel_stride;  // from one of the 36 numbers of all transformed kernels to the next

  int64_t tile_columns() const { return (width + 3) / 4; }
  int64_t tiles_of_image() const { return (height + 3) / 4 * tile_columns(); }
  int64_t tiles() const { return batch * tiles_of_image(); }
  WinogradTile tile(int64_t index) const {
    const int64_t of_image = index % tiles_of_image();
    return {index / tiles_of_image(), of_image / tile_columns() * 4, of_image % tile_columns() * 4};
  }
};

// Tiles that are worked on together, and memory for them.
struct WinogradBlock {
  int64_t first, count;
  const float* kernels;                 // transformed
  float* patches;                       // 36 times `count` rows of inputs, each `patch_row` after the last
  float* products;                      // 36 times (count, outputs)
  int64_t patch_row;
  int64_t patch_stride, product_stride;  // from one of the 36 to the next
};

// Steps of a 3x3 convolution, each over a part of what it has to do.
struct WinogradKernels {
  // 36 times (panels, inputs, panel), of the pairs (panel, input).
  void (*kernels)(const Convolution3x3&, float* transformed, int64_t begin, int64_t end);
  // Of the block's tiles.
  void (*patches)(const Convolution3x3&, const WinogradBlock&, int64_t begin, int64_t end);
  // Of the pairs (one of the 36, panel).
  void (*products)(const Convolution3x3&, const WinogradBlock&, int64_t begin, int64_t end);
  // Of the block's tiles, into output (batch, height, width, outputs).
  void (*outputs)(const Convolution3x3&, const WinogradBlock&, float* output, int64_t begin, int64_t end);
};

// A 1x1 convolution, to which what its result's memory holds may be added.
struct Pointwise {
  int64_t inputs, outputs;  // channels: multiples of 32
  const float* input;   // (pixels, inputs)
  const float* weight;  // (outputs, inputs)
  const float* bias;    // (outputs)
  bool adds, relu;
};

struct PointwiseKernels {
  // (panels, inputs, panel), of the pairs (panel, input).
  void (*weights)(const Pointwise&, float* by_panel, int64_t begin, int64_t end);
  // Pixels of output (pixels, outputs), with the weights by panels.
  void (*pixels)(const Pointwise&, const float* by_panel, float* output, int64_t begin, int64_t end);
};

enum class Activation { kNone, kRelu, kGelu, kSilu };

// A convolution with a square kernel, to which what its result's memory holds may be added; by products of bfloat16
// numbers, into three of which every float32 number is split. The sums go over taps and inputs, 32 at a step.
struct SplitConvolution {
  int64_t batch, height, width, inputs, outputs;  // outputs: a multiple of 32; inputs too, or there is but one round
  int64_t kernel, stride, padding, out_height, out_width;
  const float* input;   // (batch, height, width, inputs)
  const float* weight;  // (outputs, inputs, kernel, kernel)
  const float* bias;    // (outputs)
  bool adds;
  Activation activation;

  int64_t depth() const { return kernel * kernel * inputs; }
  int64_t steps() const { return (depth() + 31) / 32; }
  int64_t pixels() const { return batch * out_height * out_width; }
};

constexpr int64_t kSplitSteps = 16;  // of a round: what a block's pixels are split for at a time

// Pixels of the result that are worked on together, and memory for them, aligned to cache lines.
struct SplitBlock {
  int64_t first, count;
  const char* weights;  // split
  char* pixels;         // 32 times 6 bytes for each, rounded up to 32 pixels, and each step of a round
  float* sums;          // outputs for each, rounded up; not used if there is but one round
};

struct SplitKernels {
  // Into 32 times 6 bytes an output and step, aligned to cache lines; of the pairs (32 outputs, step).
  void (*weights)(const SplitConvolution&, char* split, int64_t begin, int64_t end);
  // Into output (batch, out_height, out_width, outputs).
  void (*block)(const SplitConvolution&, const SplitBlock&, float* output);
};

// Rows of numbers, each normalised by its own mean and deviation.
template <class Stored, class T>
struct LayerNorm {
  const Stored* input;  // (rows, channels)
  const T* weight;      // (channels)
  const T* bias;        // (channels)
  int64_t channels;
  T epsilon;  // added to the variance
};

// A share of the work on the gradient of the map: heads (or groups) of one batch element. Shares do
// not write to the same numbers, so they may run at the same time, and every number is summed in one
// order however the work is shared out.
struct MapShare {
  int64_t batch, head_begin, head_end;
  bool is_zero;  // the gradient's memory holds zeros already
};

// Every function works on a part of the problem, to be called from several threads at once.
template <class T>
struct Kernels {
  // Rows (batch element, query) from begin to end of the row order, of output (batch, queries, heads, channels).
  void (*ms_deform_attn)(const MsDeformAttn<T>&, T* output, int64_t begin, int64_t end);
  void (*ms_deform_attn_point_gradients)(const MsDeformAttn<T>&, const T* output_gradient,
                                         T* locations_gradient, T* weights_gradient, int64_t begin,
                                         int64_t end);
  void (*ms_deform_attn_value_gradient)(const MsDeformAttn<T>&, const T* output_gradient,
                                        T* value_gradient, const MapShare& share);

  // Rows from begin to end of the row order, of output (rows, heads, channels): the mean over a row's entries.
  void (*deform_attn)(const DeformAttn<T>&, T* output, int64_t begin, int64_t end);
  // Of the rows from begin to end; then, with the weights that leaves, the maps'.
  void (*deform_attn_point_gradients)(const DeformAttn<T>&, const T* output_gradient,
                                      const DeformAttnGradients<T>&, int64_t begin, int64_t end);
  void (*deform_attn_value_gradient)(const DeformAttn<T>&, const T* output_gradient, const T* weights,
                                     const EntriesByMap&, T* value_gradient, const MapShare& share);

  // Output rows from begin to end of one batch element; few rows cost more each than many.
  void (*dcnv3)(const Dcnv3<T>&, T* output, int64_t batch, int64_t begin, int64_t end);
  // Rows (batch element, output row) from begin to end of the output's gradient (batch, out_height, ...).
  void (*dcnv3_point_gradients)(const Dcnv3<T>&, const T* output_gradient, T* offset_gradient,
                                T* mask_gradient, int64_t begin, int64_t end);
  void (*dcnv3_input_gradient)(const Dcnv3<T>&, const T* output_gradient, T* input_gradient,
                               const MapShare& share);

  // Rows from begin to end.
  void (*layer_norm)(const LayerNorm<T, T>&, T* output, int64_t begin, int64_t end);
  void (*softmax)(const T* logits, T* weights, int64_t length, int64_t begin, int64_t end);
};

struct Isa {
  const char* name;
  Kernels<float> for_float;
  Kernels<double> for_double;
  void (*layer_norm_bfloat16)(const LayerNorm<Bfloat16, float>&, Bfloat16* output, int64_t begin, int64_t end);
  int64_t panel;  // output channels, which the weights of convolutions lie by
  WinogradKernels winograd;
  PointwiseKernels pointwise;
  const SplitKernels* split;  // null without such a unit
};

extern const Isa kBaseline;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAmx;  // AVX-512's, and the kernels of AMX
extern const SplitKernels kAmxKernels;
#endif

// The instruction set in use: the best this CPU has, or the one set by select_isa.
const Isa& current_isa();
// Name null selects the best again. False if the CPU or the build lacks it.
bool select_isa(const char* name);
// The k-th instruction set that can be selected, best first; null past the last.
const char* available_isa(int k);

template <class T>
const Kernels<T>& current_kernels();
template <>
inline const Kernels<float>& current_kernels<float>() {
  return current_isa().for_float;
}
template <>
inline const Kernels<double>& current_kernels<double>() {
  return current_isa().for_double;
}

}  // namespace bevperception::cpu
