// The three operators by ATen: oneDNN on a CPU, cuDNN on a GPU, whatever the device has elsewhere.
#pragma once

#include <tuple>

#include "torch/common/operators.h"

namespace freezekit::aten {

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&);
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry&);
// Both, and the gradient of the bias, else undefined: in one call, as torch's own node.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             bool of_bias, const Geometry&);

// dgrad of plain tensors on a CPU (is_plain_on_cpu), whose layout is known.
Tensor dgrad_on_cpu(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat layout,
                    const Geometry&);

// dx of a convolution of one to three axes by depthwise kernels of torch's own, where it takes them for such an input on a
// GPU; else undefined.
Tensor depthwise_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                       at::MemoryFormat layout, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       c10::SymInt groups);

}  // namespace freezekit::aten
