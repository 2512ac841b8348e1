// The table of one instruction set. Included by each isa_*.cpp, which is compiled for that set; all
// kernels have internal linkage, so that the linker cannot mix up the sets.
#pragma once

#include "dcnv3.h"
#include "dcnv3_backward.h"
#include "deform_attn_backward.h"
#include "ms_deform_attn.h"
#include "rows.h"

namespace bevperception::cpu {
namespace {

template <class T>
constexpr Kernels<T> kernels_of_this_isa() {
  return {
      ms_deform_attn<T>, ms_deform_attn_point_gradients<T>, ms_deform_attn_value_gradient<T>,
      deform_attn<T>,    deform_attn_point_gradients<T>,    deform_attn_value_gradient<T>,
      dcnv3<T>,          dcnv3_point_gradients<T>,          dcnv3_input_gradient<T>,
      layer_norm<T, T>,  softmax<T>,
  };
}

constexpr Isa isa_named(const char* name) {
  return {name, kernels_of_this_isa<float>(), kernels_of_this_isa<double>(), layer_norm<Bfloat16, float>};
}

}  // namespace
}  // namespace bevperception::cpu
