// Activations and dropout that keep one bit per element, for whoever calls them instead of their operators.
#pragma once

#include <ATen/core/Scalar.h>
#include <ATen/core/Tensor.h>

#include "kernels/api.h"
#include "torch/common/operators.h"

namespace freezekit {

// freezekit::activation and activation_ where autograd has its turn.
Tensor record_activation(const Tensor& input, const PiecewiseActivation&, Backend);
void record_activation_(Tensor& input, const PiecewiseActivation&, Backend);
const char* to_string(ActivationKind);

// freezekit::dropout and dropout_.
Tensor record_dropout(const Tensor& input, double p, bool train, Backend);
void record_dropout_(Tensor& input, double p, bool train, Backend);

// freezekit::prelu, whose slope is frozen.
Tensor prelu(const Tensor& input, const Tensor& weight, Backend);
// Whether `slope` broadcasts against x (N, C, ...): as many dimensions, and one value for all or one per channel.
bool is_slope_of(const Tensor& x, const Tensor& slope);
// x where x > 0, else slope * x. x requires a gradient, `slope` fits it and requires none.
Tensor record_prelu(const Tensor& x, const Tensor& slope, Backend);

// x where it exceeds the threshold or is NaN, else `value`; dx is dy where x passed, else 0. x has data on a CPU that
// nothing sees, or is on the meta device.
Tensor record_threshold(const Tensor& x, const at::Scalar& threshold, const at::Scalar& value);
void record_threshold_(Tensor& x, const at::Scalar& threshold, const at::Scalar& value);

}  // namespace freezekit
