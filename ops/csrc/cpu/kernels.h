// The CPU kernels' face: problems as pointers and sizes, and one table of functions for each
// instruction set. Nothing here or below knows PyTorch; all tensors are contiguous.
#pragma once

#include <stdint.h>

#include "../common/problems.h"

namespace bevperception::cpu {

template <class T>
struct MsDeformAttn : MsDeformAttnProblem<T> {
  const Level* levels;
  const int64_t* row_order;  // the rows (batch element, query) as they are worked on; null: as they come
};

template <class T>
struct DeformAttn : DeformAttnProblem<T> {
  const Level* levels;
  const int32_t* anchor_of;  // (levels, points): the reference point that a sampling point starts from
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
struct Dcnv3 : Dcnv3Problem<T> {
  T offset_scale;
};

struct Bfloat16 {
  uint16_t bits;
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
};

extern const Isa kBaseline;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
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
