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

// dgrad of a layer whose result has this layout. In the gradient of one channel and one pixel it does not show.
Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&,
                    at::MemoryFormat layout);

}  // namespace freezekit
