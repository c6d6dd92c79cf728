#include "torch/backends/aten.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/util/SmallVector.h>

#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit::aten {

// at::conv2d and not at::convolution: it is where torch decomposes complex convolutions.
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return at::conv2d_symint(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

// ATen's own gradient wants an input, if only for its size. On a CPU a stand-in takes no memory, and then neither time nor
// rounding differ from torch's. Elsewhere dgrad is the transposed convolution, which needs none; output_padding restores
// the rows and columns at the end that no window reached.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_dgrad takes no complex grad_output, got ", grad_output.scalar_type());
  if (is_plain_on_cpu(grad_output) && is_plain_on_cpu(weight)) {
    const Tensor input = shape_only(input_size, grad_output, layout_of(grad_output, weight));
    return std::get<0>(at::convolution_backward_symint(
        grad_output, input, weight, /*bias_sizes=*/std::nullopt, g.stride, g.padding, g.dilation,
        /*transposed=*/false, /*output_padding=*/c10::fromIntArrayRefSlow({0, 0}), g.groups, {true, false, false}));
  }
  SizeVector output_padding;
  for (size_t i = 0; i < 2; ++i) {
    const c10::SymInt reached = (grad_output.sym_size(2 + i) - 1) * g.stride[i] - g.padding[i] * 2 +
                                g.dilation[i] * (weight.sym_size(2 + i) - 1) + 1;
    output_padding.push_back(input_size[2 + i] - reached);
  }
  return at::convolution_symint(grad_output, weight, /*bias=*/{}, g.stride, g.padding, g.dilation,
                                /*transposed=*/true, output_padding, g.groups);
}

// ATen's interface wants a weight for its size and layout.
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_wgrad takes no complex grad_output, got ", grad_output.scalar_type());
  const Tensor weight = shape_only(weight_size, grad_output, layout_of(grad_output, input));
  return std::get<1>(at::convolution_backward_symint(
      grad_output, input, weight, /*bias_sizes=*/std::nullopt, g.stride, g.padding, g.dilation,
      /*transposed=*/false, /*output_padding=*/c10::fromIntArrayRefSlow({0, 0}), g.groups, {false, true, false}));
}

}  // namespace freezekit::aten
