// The nodes of normalisations that keep less than torch's, for whoever computes the value. norm.cpp says what they keep.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/autograd/formula.h"

namespace freezekit {

// freezekit::batch_norm where autograd has its turn.
Tensor record_batch_norm(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const Tensor& mean, const Tensor& var, double eps);

// By given statistics and with a weight that is frozen or undefined; the bias may be undefined. Input or bias requires
// a gradient.
AnyNodePtr batch_norm_node(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& var,
                           double eps);

// Where the bias alone requires a gradient.
AnyNodePtr layer_norm_bias_node(const Tensor& bias);
AnyNodePtr group_norm_bias_node(const Tensor& bias);

}  // namespace freezekit
