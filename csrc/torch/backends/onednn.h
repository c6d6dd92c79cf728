// oneDNN's convolution on a filter that is packed once: forward, and dgrad as a forward one on the rotated filter.
//
//   dx = conv(dy, W'),  W'[c, k, r, s] = w[k, c, R-1-r, S-1-s] within a group, padding' = dilation * (kernel - 1) - padding
//
// holds for unit stride. Packing pays only where it is kept, so these run for weights that are declared constant. Inputs
// and results are channels_last, which is what oneDNN's operator gives whatever it gets.
#pragma once

#include "torch/common/operators.h"

namespace freezekit::onednn {

// Whether the packed path takes a tensor of this dtype and device under torch's current settings, and gains by it.
bool takes(const Tensor& activation, const Tensor& weight, const Geometry&);
// Whether dgrad of this geometry is a forward convolution.
bool has_unit_stride_dgrad(const Tensor& weight, const Geometry&);

// conv(input) + bias + residual; a residual is dense channels_last. Of what is optional, undefined does nothing.
Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& residual, const Geometry&);
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& residual, const Geometry&);

}  // namespace freezekit::onednn
