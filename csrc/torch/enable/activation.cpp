// Activations that are linear in pieces, and dropout: one bit per element instead of a tensor.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include "torch/bits/layers.h"
#include "torch/enable/call.h"
#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

using at::Scalar;

template <class X>
Served<ResultOf<X>> by_bits(X x, const PiecewiseActivation& f) {
  if (!gains(Op::activation, x)) return {};
  if constexpr (kInPlace<X>) {
    record_activation_(x, f, Backend::automatic);
    return &x;
  } else {
    return record_activation(x, f, Backend::automatic);
  }
}

template <class X>
Served<ResultOf<X>> relu(const Unary<X>&, DispatchKeySet, X x) {
  return by_bits<X>(x, {ActivationKind::relu});
}

// On a GPU torch computes it: freezekit has no kernel for it. What is kept is the same under every dispatch mode.
template <class X>
Served<ResultOf<X>> threshold(const Unary<X, const Scalar&, const Scalar&>&, DispatchKeySet, X x,
                              const Scalar& threshold, const Scalar& value) {
  const bool has_device = x.device().is_cpu() || x.is_meta();
  if (!number_in(threshold) || !number_in(value) || !has_device || !gains(Op::activation, x)) return {};
  if constexpr (kInPlace<X>) {
    // Torch lets this one alone be written to elements that share memory.
    if (at::has_internal_overlap(x) == at::MemOverlap::Yes) return {};
    record_threshold_(x, threshold, value);
    return &x;
  } else {
    return record_threshold(x, threshold, value);
  }
}

// Crossed ends and NaN have rules of their own in torch.
template <class X>
Served<ResultOf<X>> hardtanh(const Unary<X, const Scalar&, const Scalar&>&, DispatchKeySet, X x, const Scalar& lowest,
                             const Scalar& highest) {
  const auto a = number_in(lowest), b = number_in(highest);
  if (!a || !b || !(*a <= *b)) return {};
  return by_bits<X>(x, {ActivationKind::hardtanh, *a, *b});
}

// Torch refuses the gradient of an in-place call with a negative slope: its own kernel says so.
template <class X>
Served<ResultOf<X>> leaky_relu(const Unary<X, const Scalar&>&, DispatchKeySet, X x, const Scalar& slope) {
  const auto a = number_in(slope);
  if (!a || !(*a >= 0)) return {};
  return by_bits<X>(x, {ActivationKind::leaky_relu, *a});
}

// What prelu is made of, with the slope as it broadcasts. On a GPU it is torch's, as in bits/prelu.cpp.
std::optional<Tensor> prelu(const Stock<Tensor(const Tensor&, const Tensor&)>&, DispatchKeySet, const Tensor& x,
                            const Tensor& slope) {
  const bool has_slope = !slope.requires_grad() && is_slope_of(x, slope);
  if (!has_slope || x.is_cuda() || !serves(Value::ours, slope) || !gains(Op::activation, x)) return {};
  return record_prelu(x, slope, Backend::automatic);
}

template <class X>
Served<ResultOf<X>> dropout(const Unary<X, double, bool>&, DispatchKeySet, X x, double p, bool train) {
  if (!train || !(p > 0 && p < 1) || !gains(Op::dropout, x) || x.numel() == 0) return {};
  if constexpr (kInPlace<X>) {
    record_dropout_(x, p, train, Backend::automatic);
    return &x;
  } else {
    return record_dropout(x, p, train, Backend::automatic);
  }
}

StandIn<relu<const Tensor&>> of_relu("relu", "relu");
StandIn<relu<Tensor&>> of_relu_("relu_", "relu_");
StandIn<threshold<const Tensor&>> of_threshold("threshold", "threshold");
StandIn<threshold<Tensor&>> of_threshold_("threshold_", "threshold_");
StandIn<hardtanh<const Tensor&>> of_hardtanh("hardtanh", "hardtanh");
StandIn<hardtanh<Tensor&>> of_hardtanh_("hardtanh_", "hardtanh_");
StandIn<leaky_relu<const Tensor&>> of_leaky_relu("leaky_relu", "leaky_relu");
StandIn<leaky_relu<Tensor&>> of_leaky_relu_("leaky_relu_", "leaky_relu_");
StandIn<prelu> of_prelu("_prelu_kernel");
StandIn<dropout<const Tensor&>, Unrecorded::to_torch> of_dropout("dropout", "native_dropout");
StandIn<dropout<Tensor&>, Unrecorded::to_torch> of_dropout_("dropout_", "native_dropout");

}  // namespace
}  // namespace freezekit::enable
