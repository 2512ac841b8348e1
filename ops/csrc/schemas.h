// What the operators of all devices take.
#pragma once

#define BEV_MS_DEFORM_ATTN_SCHEMA                                                    \
  "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, " \
  "Tensor attention_weights) -> Tensor"
#define BEV_MS_DEFORM_ATTN_BACKWARD_SCHEMA(suffix)                                            \
  "ms_deform_attn_backward" suffix "(Tensor output_gradient, Tensor value, SymInt[] spatial_shapes, " \
  "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
#define BEV_DCNV3_SCHEMA                                                                              \
  "dcnv3(Tensor input, Tensor offset, Tensor mask, int kernel_size, int stride, int padding, int dilation, " \
  "int groups, float offset_scale, bool remove_center) -> Tensor"
#define BEV_DCNV3_BACKWARD_SCHEMA(suffix)                                                              \
  "dcnv3_backward" suffix "(Tensor output_gradient, Tensor input, Tensor offset, Tensor mask, int kernel_size, " \
  "int stride, int padding, int dilation, int groups, float offset_scale, bool remove_center) "           \
  "-> (Tensor, Tensor, Tensor)"
#define BEV_DEFORM_ATTN_SCHEMA                                                                       \
  "deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor offsets, Tensor logits, Tensor references, " \
  "SymInt[] anchors, SymInt groups, Tensor? row_start, Tensor? map_of) -> Tensor"
#define BEV_DEFORM_ATTN_BACKWARD_SCHEMA                                                                  \
  "deform_attn_backward(Tensor output_gradient, Tensor value, SymInt[] spatial_shapes, Tensor offsets, "     \
  "Tensor logits, Tensor references, SymInt[] anchors, SymInt groups, Tensor? row_start, Tensor? map_of, "   \
  "bool of_references) -> (Tensor, Tensor, Tensor, Tensor)"
