// Autograd of conv2d for whoever computes its value.
#pragma once

#include <c10/util/FunctionRef.h>

#include "torch/common/operators.h"

namespace freezekit {

// freezekit::conv2d where autograd has its turn.
Tensor record_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);

// compute(), run below autograd, as the result of a conv2d: its node keeps what the gradients asked for read. The bias
// may be undefined.
Tensor record_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Geometry&,
                     c10::function_ref<Tensor()> compute);

}  // namespace freezekit
