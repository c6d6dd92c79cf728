// PReLU with a frozen slope, for whoever computes its value.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/common/operators.h"

namespace freezekit {

// Whether `slope` broadcasts against x (N, C, ...): as many dimensions, and one value for all or one per channel.
bool is_slope_of(const Tensor& x, const Tensor& slope);

// freezekit::prelu where autograd has its turn.
Tensor prelu(const Tensor& input, const Tensor& weight, Backend);

// x where x > 0, else slope * x. x requires a gradient, `slope` fits it and requires none.
Tensor record_prelu(const Tensor& x, const Tensor& slope, Backend);

}  // namespace freezekit
