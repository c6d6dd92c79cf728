// The nodes of normalisations that keep less than torch's, for whoever computes the value. norm.cpp says what they keep.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/autograd/formula.h"
#include "torch/common/operators.h"

namespace freezekit {

// freezekit::batch_norm where autograd has its turn.
Tensor record_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& var, double eps);

// By given statistics and with a weight that is frozen or undefined; the bias may be undefined. Input or bias requires
// a gradient.
AnyNodePtr batch_norm_node(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& var,
                           double eps);

// Whether of a layer norm or group norm the bias alone learns: its gradient is a sum of the output's, and reads no
// activation.
inline bool is_for_bias_alone(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return learns(bias) && !learns(input) && !learns(weight);
}
// The nodes of these.
AnyNodePtr layer_norm_bias_node(const Tensor& bias);
AnyNodePtr group_norm_bias_node(const Tensor& bias);

}  // namespace freezekit
