#include "torch/backends/aten.h"

#include <ATen/Parallel.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/util/SmallVector.h>

#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit::aten {
namespace {

// With one thread and a batch under 16 ATen gives 1x1 convolutions to its own GEMM instead of oneDNN, and transposed
// ones to a slower way than the plain product that a 1x1 dgrad is.
bool is_small_pointwise(const Tensor& grad_output, const Tensor& weight, const Geometry& g) {
  const Geometry::Pair ones = {1, 1}, zeros = {0, 0};
  if (at::get_num_threads() != 1 || !is_plain_on_cpu(grad_output) || !is_plain_on_cpu(weight)) return false;
  return (grad_output.scalar_type() == at::kFloat || grad_output.scalar_type() == at::kDouble) && g.groups == 1 &&
         g.stride == ones && g.padding == zeros && weight.size(2) == 1 && weight.size(3) == 1 &&
         grad_output.size(0) < 16 && grad_output.numel() > 0;
}

// dx[n] = w^T dy[n] for 1x1 filters; the product reads both as they lie.
Tensor pointwise_dgrad(const Tensor& dy, const Tensor& w) {
  const int64_t n = dy.size(0), k = dy.size(1), p = dy.size(2), q = dy.size(3), c = w.size(1);
  const Tensor matrix = w.reshape({k, c});
  if (layout_of(dy, w) == at::MemoryFormat::ChannelsLast) {
    return dy.permute({0, 2, 3, 1}).reshape({n * p * q, k}).mm(matrix).view({n, p, q, c}).permute({0, 3, 1, 2});
  }
  return matrix.t().unsqueeze(0).expand({n, c, k}).bmm(dy.reshape({n, k, p * q})).view({n, c, p, q});
}

}  // namespace

// at::conv2d and not at::convolution: it is where torch decomposes complex convolutions.
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return at::conv2d_symint(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

// dgrad is the transposed convolution, which needs no input tensor: convolution_backward would want one, if only for
// its size. output_padding restores the rows and columns at the end that no window reached.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_dgrad takes no complex grad_output, got ",
              grad_output.scalar_type());
  if (is_small_pointwise(grad_output, weight, g)) return pointwise_dgrad(grad_output, weight);
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
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_wgrad takes no complex grad_output, got ",
              grad_output.scalar_type());
  const Tensor weight = shape_only(weight_size, grad_output, layout_of(grad_output, input));
  return std::get<1>(at::convolution_backward_symint(
      grad_output, input, weight, /*bias_sizes=*/std::nullopt, g.stride, g.padding, g.dilation,
      /*transposed=*/false, /*output_padding=*/c10::fromIntArrayRefSlow({0, 0}), g.groups, {false, true, false}));
}

}  // namespace freezekit::aten
