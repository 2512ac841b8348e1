// What a layer does to its sums last.
#pragma once

#include "kernels.h"
#include "softmax.h"

namespace bevperception::cpu {
namespace {

// What is not a number stays so in all of them.
struct Unchanged {
  template <class F>
  BEV_INLINE F operator()(const F& x) const {
    return x;
  }
};

struct Relu {
  template <class F>
  BEV_INLINE F operator()(const F& x) const {
    return x < F{} ? F{} : x;
  }
};

// x times the normal distribution's integral up to x, to 1.5e-7 of it.
// Source: M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions, 7.1.26.
struct Gelu {
  template <class F>
  BEV_INLINE F operator()(const F& x) const {
    constexpr int N = sizeof(F) / sizeof(float);
    const F size = (x < F{} ? -x : x) * 0.70710678f;
    const F t = 1.0f / (1.0f + 0.3275911f * size);
    F sum = 1.061405429f * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const F tail = 0.5f * sum * t * exp_of_negative<N>(-size * size);  // beyond |x|
    return x * (x < F{} ? tail : 1.0f - tail);
  }
};

// x / (1 + e^-x).
struct Silu {
  template <class F>
  BEV_INLINE F operator()(const F& x) const {
    constexpr int N = sizeof(F) / sizeof(float);
    const F e = exp_of_negative<N>(x < F{} ? x : -x);
    return x * (x < F{} ? e : F{} + 1.0f) / (1.0f + e);
  }
};

// Calls body with the function.
template <class Body>
BEV_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone: return body(Unchanged());
    case Activation::kRelu: return body(Relu());
    case Activation::kGelu: return body(Gelu());
    case Activation::kSilu: return body(Silu());
  }
}

}  // namespace
}  // namespace bevperception::cpu
