// Convolutions on a CPU, in float32, of which oneDNN is slow. Results are channels_last.
#pragma once

#include "torch/common/operators.h"

namespace freezekit {

// dgrad of few input channels: that of a network's first layer, where its input learns (csrc/cpu/few_channels.h). oneDNN's,
// which is vectorised over channels, takes three to five times the forward pass.
namespace few_channels {

bool takes(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);
Tensor dgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);

}  // namespace few_channels

// Convolutions of few output positions, which read the filter as it is (csrc/cpu/few_rows.h).
//
// oneDNN first reorders a filter into a layout of its own. For few positions, as the deep layers of a network have at small
// batches, that takes as long as the convolution, and keeping the result would let it go stale.
namespace few_positions {

// Whether this is a convolution for it, or a dgrad, by sizes and by whose memory is dense.
bool takes(Operator, const Conv2dProblem&, const Tensor& activation, const Tensor& weight);

Tensor conv2d(const Conv2dProblem&, const Tensor& input, const Tensor& weight);
Tensor dgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);

}  // namespace few_positions

}  // namespace freezekit
