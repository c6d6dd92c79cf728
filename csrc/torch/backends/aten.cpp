#include "torch/backends/aten.h"

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit::aten {

// at::conv2d and not at::convolution: it is where torch decomposes complex convolutions.
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return at::conv2d_symint(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

Tensor depthwise_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                       at::MemoryFormat layout, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       c10::SymInt groups) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  if (!weight.is_cuda() || groups == 1 || weight.sym_size(1) != 1 || weight.key_set().has_any(batched)) return {};
  if (grad_output.dim() == 3) {  // a row of an image, as torch itself takes it
    const auto after = [](c10::SymInt first, SymIntArrayRef numbers) { return SizeVector{first, numbers[0]}; };
    const SizeVector size = {input_size[0], input_size[1], 1, input_size[2]};
    const Tensor dx = depthwise_dgrad(grad_output.unsqueeze(2), weight.unsqueeze(2), size, layout, after(1, stride),
                                      after(0, padding), after(1, dilation), groups);
    return dx.defined() ? dx.squeeze(2) : dx;
  }
  const SizeVector none(stride.size(), 0);
  const auto found = at::native::select_conv_backend(without_data(input_size, grad_output, layout), weight,
                                                     /*bias=*/std::nullopt, stride, padding, dilation,
                                                     /*transposed=*/false, none, groups, /*bias_sizes=*/std::nullopt);
  using at::native::ConvBackend;
  if (found != ConvBackend::CudaDepthwise2d && found != ConvBackend::CudaDepthwise3d) return {};
  // Such a kernel reads the size of an input. Whatever else may read it finds one number.
  const Tensor input = at::empty({1}, grad_output.options()).expand_symint(input_size);
  return std::get<0>(at::convolution_backward_symint(grad_output, input, weight, /*bias_sizes=*/std::nullopt, stride,
                                                     padding, dilation, /*transposed=*/false, none, groups,
                                                     {true, false, false}));
}

// ATen's own gradient wants an input, if only for its size. A stand-in takes no memory, and then neither time nor rounding
// differ from torch's.
Tensor dgrad_on_cpu(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat layout,
                    const Geometry& g) {
  static const SizeVector none(2, 0);
  const Tensor input = shape_only_beside_plain(input_size, grad_output, layout);
  return std::get<0>(at::convolution_backward_symint(grad_output, input, weight, /*bias_sizes=*/std::nullopt, g.stride,
                                                     g.padding, g.dilation, /*transposed=*/false,
                                                     /*output_padding=*/none, g.groups, {true, false, false}));
}

// On a GPU torch's depthwise kernels get a stand-in too: cuDNN's grouped ones are slow beside them. Elsewhere dgrad is the
// transposed convolution, which needs no input; output_padding restores the rows and columns at the end that no window
// reached.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_dgrad takes no complex grad_output, got ", grad_output.scalar_type());
  const auto layout = layout_of(grad_output, weight);
  if (is_plain_on_cpu(grad_output) && is_plain_on_cpu(weight)) {
    return dgrad_on_cpu(grad_output, weight, input_size, layout, g);
  }
  const Tensor dx = depthwise_dgrad(grad_output, weight, input_size, layout, g.stride, g.padding, g.dilation, g.groups);
  if (dx.defined()) return dx;
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

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             bool of_bias, const Geometry& g) {
  const c10::SymInt filters = grad_output.sym_size(1);
  const at::OptionalSymIntArrayRef bias_size = of_bias ? at::OptionalSymIntArrayRef(filters) : std::nullopt;
  return at::convolution_backward_symint(
      grad_output, input, weight, bias_size, g.stride, g.padding, g.dilation, /*transposed=*/false,
      /*output_padding=*/c10::fromIntArrayRefSlow({0, 0}), g.groups, {true, true, of_bias});
}

}  // namespace freezekit::aten
