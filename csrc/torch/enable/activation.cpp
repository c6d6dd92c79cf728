// Activations that are linear in pieces, and dropout: one bit per element instead of a tensor.
#include "torch/bits/activation.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include "torch/bits/dropout.h"
#include "torch/bits/prelu.h"
#include "torch/bits/threshold.h"
#include "torch/enable/call.h"
#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

using at::Scalar;

using Unary = Stock<Tensor(const Tensor&)>;
using InplaceUnary = Stock<Tensor&(Tensor&)>;
using WithNumber = Stock<Tensor(const Tensor&, const Scalar&)>;
using InplaceWithNumber = Stock<Tensor&(Tensor&, const Scalar&)>;
using WithNumbers = Stock<Tensor(const Tensor&, const Scalar&, const Scalar&)>;
using InplaceWithNumbers = Stock<Tensor&(Tensor&, const Scalar&, const Scalar&)>;
using Binary = Stock<Tensor(const Tensor&, const Tensor&)>;
using Dropout = Stock<Tensor(const Tensor&, double, bool)>;
using InplaceDropout = Stock<Tensor&(Tensor&, double, bool)>;

Tensor activation(const Tensor& x, ActivationKind kind, double a = 0, double b = 0) {
  return record_activation(x, {kind, a, b}, Backend::automatic);
}

Tensor& activation_inplace(Tensor& x, ActivationKind kind, double a = 0, double b = 0) {
  record_activation_(x, {kind, a, b}, Backend::automatic);
  return x;
}

bool has_bits(const Tensor& x) { return gains(Op::activation, x); }

bool is_number(const Scalar& scalar) {
  return !scalar.isSymbolic() && (scalar.isFloatingPoint() || scalar.isIntegral(/*includeBool=*/false));
}

Tensor relu(const Unary& op, DispatchKeySet keys, const Tensor& x) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x);
  return has_bits(x) ? activation(x, ActivationKind::relu) : op.stock(keys, x);
}

Tensor& relu_(const InplaceUnary& op, DispatchKeySet keys, Tensor& x) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x);
  return has_bits(x) ? activation_inplace(x, ActivationKind::relu) : op.stock(keys, x);
}

// On a GPU torch computes it: freezekit has no kernel for it. What is kept is the same under every dispatch mode.
bool has_threshold(const Tensor& x, const Scalar& threshold, const Scalar& value) {
  return is_number(threshold) && is_number(value) && (x.device().is_cpu() || x.is_meta()) && has_bits(x);
}

Tensor threshold(const WithNumbers& op, DispatchKeySet keys, const Tensor& x, const Scalar& threshold,
                 const Scalar& value) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, threshold, value);
  return has_threshold(x, threshold, value) ? record_threshold(x, threshold, value)
                                            : op.stock(keys, x, threshold, value);
}

Tensor& threshold_(const InplaceWithNumbers& op, DispatchKeySet keys, Tensor& x, const Scalar& threshold,
                   const Scalar& value) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, threshold, value);
  // Torch lets this one alone be written to elements that share memory.
  if (!has_threshold(x, threshold, value) || at::has_internal_overlap(x) == at::MemOverlap::Yes) {
    return op.stock(keys, x, threshold, value);
  }
  record_threshold_(x, threshold, value);
  return x;
}

// Crossed ends and NaN have rules of their own in torch.
bool are_ends(const Scalar& lowest, const Scalar& highest) {
  return is_number(lowest) && is_number(highest) && lowest.toDouble() <= highest.toDouble();
}

Tensor hardtanh(const WithNumbers& op, DispatchKeySet keys, const Tensor& x, const Scalar& lowest,
                const Scalar& highest) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, lowest, highest);
  if (!are_ends(lowest, highest) || !has_bits(x)) return op.stock(keys, x, lowest, highest);
  return activation(x, ActivationKind::hardtanh, lowest.toDouble(), highest.toDouble());
}

Tensor& hardtanh_(const InplaceWithNumbers& op, DispatchKeySet keys, Tensor& x, const Scalar& lowest,
                  const Scalar& highest) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, lowest, highest);
  if (!are_ends(lowest, highest) || !has_bits(x)) return op.stock(keys, x, lowest, highest);
  return activation_inplace(x, ActivationKind::hardtanh, lowest.toDouble(), highest.toDouble());
}

// Torch refuses the gradient of an in-place call with a negative slope: its own kernel says so.
bool is_slope(const Scalar& slope) { return is_number(slope) && slope.toDouble() >= 0; }

Tensor leaky_relu(const WithNumber& op, DispatchKeySet keys, const Tensor& x, const Scalar& slope) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, slope);
  if (!is_slope(slope) || !has_bits(x)) return op.stock(keys, x, slope);
  return activation(x, ActivationKind::leaky_relu, slope.toDouble());
}

Tensor& leaky_relu_(const InplaceWithNumber& op, DispatchKeySet keys, Tensor& x, const Scalar& slope) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, slope);
  if (!is_slope(slope) || !has_bits(x)) return op.stock(keys, x, slope);
  return activation_inplace(x, ActivationKind::leaky_relu, slope.toDouble());
}

// What prelu is made of, with the slope as it broadcasts.
Tensor prelu(const Binary& op, DispatchKeySet keys, const Tensor& x, const Tensor& slope) {
  if (is_unrecorded(x, slope)) return op.unrecorded(keys, x, slope);
  const bool has_slope = !slope.requires_grad() && is_slope_of(x, slope);
  // On a GPU it is torch's, as in bits/prelu.cpp.
  if (!has_slope || x.is_cuda() || !serves(Value::ours, slope) || !has_bits(x)) {
    return op.stock(keys, x, slope);
  }
  return record_prelu(x, slope, Backend::automatic);
}

// Torch composes dropout of other operators, which modes and tracers see: under one of these its own kernel is called.
bool drops(const Tensor& x, double p, bool train) {
  return train && !is_unrecorded(x) && p > 0 && p < 1 && gains(Op::dropout, x) && x.numel() > 0;
}

Tensor dropout(const Dropout& op, DispatchKeySet keys, const Tensor& x, double p, bool train) {
  if (train && is_unseen(x) && is_unrecorded(x)) return op.unrecorded(keys, x, p, train);
  return drops(x, p, train) ? record_dropout(x, p, train, Backend::automatic) : op.stock(keys, x, p, train);
}

Tensor& dropout_(const InplaceDropout& op, DispatchKeySet keys, Tensor& x, double p, bool train) {
  if (train && is_unseen(x) && is_unrecorded(x)) return op.unrecorded(keys, x, p, train);
  if (!drops(x, p, train)) return op.stock(keys, x, p, train);
  record_dropout_(x, p, train, Backend::automatic);
  return x;
}

StandIn<relu> of_relu("relu", "relu");
StandIn<relu_> of_relu_("relu_", "relu_");
StandIn<threshold> of_threshold("threshold", "threshold");
StandIn<threshold_> of_threshold_("threshold_", "threshold_");
StandIn<hardtanh> of_hardtanh("hardtanh", "hardtanh");
StandIn<hardtanh_> of_hardtanh_("hardtanh_", "hardtanh_");
StandIn<leaky_relu> of_leaky_relu("leaky_relu", "leaky_relu");
StandIn<leaky_relu_> of_leaky_relu_("leaky_relu_", "leaky_relu_");
StandIn<prelu> of_prelu("_prelu_kernel");
StandIn<dropout> of_dropout("dropout", "native_dropout");
StandIn<dropout_> of_dropout_("dropout_", "native_dropout");

}  // namespace
}  // namespace freezekit::enable
