// What the operators are given, declared once for CPUs and GPUs: sizes and tensors, all on the operator's device.
// T: type of the numbers; void where a launch knows it only at run time.
#pragma once

#include "dcnv3.h"
#include "ms_deform_attn.h"

namespace bevperception {

template <class T>
struct MsDeformAttnProblem {
  MsDeformAttnSizes sizes;
  const T* value;      // (batch, cells, heads, channels)
  const T* locations;  // (batch, queries, heads, levels, points, 2)
  const T* weights;    // (batch, queries, heads, levels, points)
};

// Rows, one a query, look into maps through entries (row, map). A row's offsets and logits hold for all
// of its entries; an entry has reference points of its own.
template <class T>
struct DeformAttnProblem {
  MsDeformAttnSizes sizes;  // batch: maps; queries: rows of a map, where row_start is null
  const T* value;           // (maps, cells, heads, channels)
  const T* offsets;         // (rows, heads, levels, points, 2) in cells; a row is contiguous
  int64_t offsets_stride;
  const T* logits;  // (rows, heads, levels, points); a row is contiguous
  int64_t logits_stride;
  const T* references;  // (entries, anchors, 2)
  int64_t anchors;
  int64_t groups;            // softmax within each of so many equal parts of (levels, points)
  const int64_t* row_start;  // (rows + 1) into the entries; null: one entry a row, maps one after another
  const int64_t* map_of;     // (entries); null with row_start
};

template <class T>
struct Dcnv3Problem {
  Dcnv3Sizes sizes;
  const T* input;   // (batch, height, width, groups, channels)
  const T* offset;  // (batch, out_height, out_width, groups, points, 2)
  const T* mask;    // (batch, out_height, out_width, groups, points)
};

}  // namespace bevperception
