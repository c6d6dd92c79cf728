// Activations that keep one bit per element, for whoever calls them instead of their operators.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/api.h"
#include "torch/common/operators.h"

namespace freezekit {

// freezekit::activation and activation_ where autograd has its turn.
Tensor record_activation(const Tensor& input, const PiecewiseActivation&, Backend);
void record_activation_(Tensor& input, const PiecewiseActivation&, Backend);

const char* to_string(ActivationKind);

}  // namespace freezekit
