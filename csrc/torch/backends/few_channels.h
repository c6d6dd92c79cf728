// dgrad of a convolution of few input channels on a CPU, in float32: that of a network's first layer, where its input
// learns (csrc/cpu/few_channels.h). oneDNN's, which is vectorised over channels, takes three to five times the forward pass.
#pragma once

#include "torch/common/operators.h"

namespace freezekit::few_channels {

bool takes(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);

// The result is channels_last.
Tensor dgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);

}  // namespace freezekit::few_channels
