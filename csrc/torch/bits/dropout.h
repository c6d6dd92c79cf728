// Dropout that keeps one bit per element, for whoever calls it instead of its operators.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/common/operators.h"

namespace freezekit {

// freezekit::dropout and dropout_ where autograd has its turn.
Tensor record_dropout(const Tensor& input, double p, bool train, Backend);
void record_dropout_(Tensor& input, double p, bool train, Backend);

}  // namespace freezekit
