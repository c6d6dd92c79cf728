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

extern Operator<Tensor(const Tensor&)> torch_relu;
extern Operator<Tensor&(Tensor&)> torch_relu_inplace;
extern Operator<Tensor(const Tensor&, const Scalar&, const Scalar&)> torch_threshold, torch_hardtanh;
extern Operator<Tensor&(Tensor&, const Scalar&, const Scalar&)> torch_threshold_inplace, torch_hardtanh_inplace;
extern Operator<Tensor(const Tensor&, const Scalar&)> torch_leaky_relu;
extern Operator<Tensor&(Tensor&, const Scalar&)> torch_leaky_relu_inplace;
extern Operator<Tensor(const Tensor&, const Tensor&)> torch_prelu;
extern Operator<Tensor(const Tensor&, double, bool)> torch_dropout;
extern Operator<Tensor&(Tensor&, double, bool)> torch_dropout_inplace;

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

Tensor relu(DispatchKeySet keys, const Tensor& x) {
  if (is_unrecorded(x)) return torch_relu.unrecorded(keys, x);
  return has_bits(x) ? activation(x, ActivationKind::relu) : torch_relu.stock(keys, x);
}

Tensor& relu_(DispatchKeySet keys, Tensor& x) {
  if (is_unrecorded(x)) return torch_relu_inplace.unrecorded(keys, x);
  return has_bits(x) ? activation_inplace(x, ActivationKind::relu) : torch_relu_inplace.stock(keys, x);
}

// On a GPU it is torch's: no kernel of freezekit's computes it. What is kept does not depend on who looks on.
bool has_threshold(const Tensor& x, const Scalar& threshold, const Scalar& value) {
  return is_number(threshold) && is_number(value) && (x.device().is_cpu() || x.is_meta()) && has_bits(x);
}

Tensor threshold(DispatchKeySet keys, const Tensor& x, const Scalar& threshold, const Scalar& value) {
  if (is_unrecorded(x)) return torch_threshold.unrecorded(keys, x, threshold, value);
  return has_threshold(x, threshold, value) ? record_threshold(x, threshold, value)
                                            : torch_threshold.stock(keys, x, threshold, value);
}

Tensor& threshold_(DispatchKeySet keys, Tensor& x, const Scalar& threshold, const Scalar& value) {
  if (is_unrecorded(x)) return torch_threshold_inplace.unrecorded(keys, x, threshold, value);
  // Torch lets this one alone be written to elements that share memory.
  if (!has_threshold(x, threshold, value) || at::has_internal_overlap(x) == at::MemOverlap::Yes) {
    return torch_threshold_inplace.stock(keys, x, threshold, value);
  }
  record_threshold_(x, threshold, value);
  return x;
}

// Crossed ends and NaN have rules of their own in torch.
bool are_ends(const Scalar& lowest, const Scalar& highest) {
  return is_number(lowest) && is_number(highest) && lowest.toDouble() <= highest.toDouble();
}

Tensor hardtanh(DispatchKeySet keys, const Tensor& x, const Scalar& lowest, const Scalar& highest) {
  if (is_unrecorded(x)) return torch_hardtanh.unrecorded(keys, x, lowest, highest);
  if (!are_ends(lowest, highest) || !has_bits(x)) return torch_hardtanh.stock(keys, x, lowest, highest);
  return activation(x, ActivationKind::hardtanh, lowest.toDouble(), highest.toDouble());
}

Tensor& hardtanh_(DispatchKeySet keys, Tensor& x, const Scalar& lowest, const Scalar& highest) {
  if (is_unrecorded(x)) return torch_hardtanh_inplace.unrecorded(keys, x, lowest, highest);
  if (!are_ends(lowest, highest) || !has_bits(x)) return torch_hardtanh_inplace.stock(keys, x, lowest, highest);
  return activation_inplace(x, ActivationKind::hardtanh, lowest.toDouble(), highest.toDouble());
}

// Torch refuses the gradient of an in-place call with a negative slope: its own kernel says so.
bool is_slope(const Scalar& slope) { return is_number(slope) && slope.toDouble() >= 0; }

Tensor leaky_relu(DispatchKeySet keys, const Tensor& x, const Scalar& slope) {
  if (is_unrecorded(x)) return torch_leaky_relu.unrecorded(keys, x, slope);
  if (!is_slope(slope) || !has_bits(x)) return torch_leaky_relu.stock(keys, x, slope);
  return activation(x, ActivationKind::leaky_relu, slope.toDouble());
}

Tensor& leaky_relu_(DispatchKeySet keys, Tensor& x, const Scalar& slope) {
  if (is_unrecorded(x)) return torch_leaky_relu_inplace.unrecorded(keys, x, slope);
  if (!is_slope(slope) || !has_bits(x)) return torch_leaky_relu_inplace.stock(keys, x, slope);
  return activation_inplace(x, ActivationKind::leaky_relu, slope.toDouble());
}

// What prelu is made of, with the slope as it broadcasts.
Tensor prelu(DispatchKeySet keys, const Tensor& x, const Tensor& slope) {
  if (is_unrecorded(x, slope)) return torch_prelu.unrecorded(keys, x, slope);
  const bool has_slope = !slope.requires_grad() && is_slope_of(x, slope);
  // On a GPU it is torch's, as in bits/prelu.cpp.
  if (!has_slope || x.is_cuda() || !serves(Value::ours, slope) || !has_bits(x)) {
    return torch_prelu.stock(keys, x, slope);
  }
  return record_prelu(x, slope, Backend::automatic);
}

// Torch composes dropout of other operators, above all that looks on: where something does, its own kernel is called.
bool drops(const Tensor& x, double p, bool train) {
  return train && !is_unrecorded(x) && p > 0 && p < 1 && gains(Op::dropout, x) && x.numel() > 0;
}

Tensor dropout(DispatchKeySet keys, const Tensor& x, double p, bool train) {
  if (train && is_unseen(x) && is_unrecorded(x)) return torch_dropout.unrecorded(keys, x, p, train);
  return drops(x, p, train) ? record_dropout(x, p, train, Backend::automatic) : torch_dropout.stock(keys, x, p, train);
}

Tensor& dropout_(DispatchKeySet keys, Tensor& x, double p, bool train) {
  if (train && is_unseen(x) && is_unrecorded(x)) return torch_dropout_inplace.unrecorded(keys, x, p, train);
  if (!drops(x, p, train)) return torch_dropout_inplace.stock(keys, x, p, train);
  record_dropout_(x, p, train, Backend::automatic);
  return x;
}

Operator<Tensor(const Tensor&)> torch_relu("relu", TORCH_FN(relu), "relu");
Operator<Tensor&(Tensor&)> torch_relu_inplace("relu_", TORCH_FN(relu_), "relu_");
Operator<Tensor(const Tensor&, const Scalar&, const Scalar&)> torch_threshold("threshold", TORCH_FN(threshold),
                                                                              "threshold");
Operator<Tensor&(Tensor&, const Scalar&, const Scalar&)> torch_threshold_inplace("threshold_", TORCH_FN(threshold_),
                                                                                 "threshold_");
Operator<Tensor(const Tensor&, const Scalar&, const Scalar&)> torch_hardtanh("hardtanh", TORCH_FN(hardtanh),
                                                                             "hardtanh");
Operator<Tensor&(Tensor&, const Scalar&, const Scalar&)> torch_hardtanh_inplace("hardtanh_", TORCH_FN(hardtanh_),
                                                                                "hardtanh_");
Operator<Tensor(const Tensor&, const Scalar&)> torch_leaky_relu("leaky_relu", TORCH_FN(leaky_relu), "leaky_relu");
Operator<Tensor&(Tensor&, const Scalar&)> torch_leaky_relu_inplace("leaky_relu_", TORCH_FN(leaky_relu_), "leaky_relu_");
Operator<Tensor(const Tensor&, const Tensor&)> torch_prelu("_prelu_kernel", TORCH_FN(prelu));
Operator<Tensor(const Tensor&, double, bool)> torch_dropout("dropout", TORCH_FN(dropout), "native_dropout");
Operator<Tensor&(Tensor&, double, bool)> torch_dropout_inplace("dropout_", TORCH_FN(dropout_), "native_dropout");

}  // namespace
}  // namespace freezekit::enable
