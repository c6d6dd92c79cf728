#include "torch/backends/aten.h"

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit::aten {
namespace {

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                            at::OptionalSymIntArrayRef bias_size, const Convolution& c,
                                            std::array<bool, 3> wanted) {
  return at::convolution_backward_symint(grad_output, input, weight, bias_size, c.stride, c.padding, c.dilation,
                                         c.transposed, c.output_padding, c.groups, wanted);
}

// dx by depthwise kernels of torch's own, where it takes them for such an input on a GPU; else undefined. Beside them cuDNN's
// grouped ones, which a transposed convolution would run, are slow.
Tensor depthwise_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                       at::MemoryFormat format, const Convolution& c) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  if (!weight.is_cuda() || c.transposed || c.groups == 1 || weight.sym_size(1) != 1 ||
      weight.key_set().has_any(batched)) {
    return {};
  }
  if (grad_output.dim() == 3) {  // a row of an image, as torch itself takes it
    const auto after = [](c10::SymInt first, SymIntArrayRef numbers) { return SizeVector{first, numbers[0]}; };
    const SizeVector size = {input_size[0], input_size[1], 1, input_size[2]}, none(2, 0);
    const SizeVector stride = after(1, c.stride), padding = after(0, c.padding), dilation = after(1, c.dilation);
    const Tensor dx = depthwise_dgrad(grad_output.unsqueeze(2), weight.unsqueeze(2), size, format,
                                      {stride, padding, dilation, none, c.groups, /*transposed=*/false});
    return dx.defined() ? dx.squeeze(2) : dx;
  }
  const auto found = at::native::select_conv_backend(without_data(input_size, grad_output, format), weight,
                                                     /*bias=*/std::nullopt, c.stride, c.padding, c.dilation,
                                                     /*transposed=*/false, c.output_padding, c.groups,
                                                     /*bias_sizes=*/std::nullopt);
  using at::native::ConvBackend;
  if (found != ConvBackend::CudaDepthwise2d && found != ConvBackend::CudaDepthwise3d) return {};
  // Such a kernel reads the size of an input. Whatever else may read it finds one number.
  const Tensor input = at::empty({1}, grad_output.options()).expand_symint(input_size);
  return std::get<0>(backward(grad_output, input, weight, std::nullopt, c, {true, false, false}));
}

void check_real(const Tensor& grad_output, const char* name) {
  TORCH_CHECK(!grad_output.is_complex(), name, " takes no complex grad_output, got ", grad_output.scalar_type());
}

}  // namespace

Convolution convolution_of(const Geometry& g) {
  static const SizeVector none(2, 0);
  return {g.stride, g.padding, g.dilation, none, g.groups, /*transposed=*/false};
}

// at::conv2d and not at::convolution: it is where torch decomposes complex convolutions.
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return at::conv2d_symint(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  check_real(grad_output, "conv2d_dgrad");
  return dgrad(grad_output, weight, input_size, layout_of(grad_output, weight), convolution_of(g));
}

Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  check_real(grad_output, "conv2d_wgrad");
  return wgrad(grad_output, input, weight_size, layout_of(grad_output, input), convolution_of(g));
}

// ATen's own gradient wants an input, if only for its size. A stand-in takes no memory, and then neither time nor rounding
// differ from torch's.
Tensor dgrad_on_cpu(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat format,
                    const Convolution& c) {
  const Tensor input = shape_only_beside_plain(input_size, grad_output, format);
  return std::get<0>(backward(grad_output, input, weight, std::nullopt, c, {true, false, false}));
}

// Where a stand-in does not serve, dgrad is the transposed convolution, or the plain one of a transposed one, which needs
// no input. The transposed convolution ends where the last window does: output_padding restores what is beyond. A transposed
// convolution's own output_padding can make its dgrad longer than x: what is past its end is cut, and the rest is copied,
// since torch's gradient is dense.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat format,
             const Convolution& c) {
  if (is_plain_on_cpu(grad_output) && is_plain_on_cpu(weight)) {
    return dgrad_on_cpu(grad_output, weight, input_size, format, c);
  }
  if (Tensor dx = depthwise_dgrad(grad_output, weight, input_size, format, c); dx.defined()) return dx;
  const int64_t axes = grad_output.dim() - 2;
  SizeVector output_padding(axes, 0);
  for (int64_t i = 0; i < axes && !c.transposed; ++i) {
    const c10::SymInt reached = (grad_output.sym_size(2 + i) - 1) * c.stride[i] - c.padding[i] * 2 +
                                c.dilation[i] * (weight.sym_size(2 + i) - 1) + 1;
    output_padding[i] = input_size[2 + i] - reached;
  }
  Tensor dx = at::convolution_symint(grad_output, weight, /*bias=*/{}, c.stride, c.padding, c.dilation, !c.transposed,
                                     output_padding, c.groups);
  for (int64_t i = 0; i < axes && c.transposed; ++i) {
    if (dx.sym_size(2 + i) != input_size[2 + i]) dx = dx.narrow_symint(2 + i, 0, input_size[2 + i]);
  }
  return in_layout(dx, format);
}

// ATen's interface wants a weight for its size and layout.
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, at::MemoryFormat format,
             const Convolution& c) {
  const Tensor weight = shape_only(weight_size, grad_output, format);
  return std::get<1>(backward(grad_output, input, weight, std::nullopt, c, {false, true, false}));
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             bool of_bias, const Convolution& c) {
  const c10::SymInt filters = grad_output.sym_size(1);
  const at::OptionalSymIntArrayRef bias_size = of_bias ? at::OptionalSymIntArrayRef(filters) : std::nullopt;
  return backward(grad_output, input, weight, bias_size, c, {true, true, of_bias});
}

}  // namespace freezekit::aten
