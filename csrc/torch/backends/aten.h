// Convolutions and their gradients by ATen: oneDNN on a CPU, cuDNN on a GPU, whatever the device has elsewhere.
#pragma once

#include <tuple>

#include "torch/common/operators.h"

namespace freezekit::aten {

// A convolution of one to three axes, plain or transposed.
struct Convolution {
  SymIntArrayRef stride, padding, dilation, output_padding;
  c10::SymInt groups;
  bool transposed;
};
Convolution convolution_of(const Geometry&);

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&);
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry&);

// The same of any convolution; `format` is that of dx, and of the weight.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat format,
             const Convolution&);
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, at::MemoryFormat format,
             const Convolution&);
// Both, and the gradient of the bias, else undefined: in one call, as torch's own node.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             bool of_bias, const Convolution&);

// dgrad of plain tensors on a CPU (is_plain_on_cpu).
Tensor dgrad_on_cpu(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat format,
                    const Convolution&);

}  // namespace freezekit::aten
