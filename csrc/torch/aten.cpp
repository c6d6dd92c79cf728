#include "torch/aten.h"

#include <ATen/Parallel.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include "torch/checks.h"
#include "torch/layout.h"

namespace freezekit::aten {
namespace {

c10::SymIntArrayRef sym(const std::array<int64_t, 2>& values) { return c10::fromIntArrayRefSlow(values); }

// With one thread and a small batch ATen gives 1x1 convolutions to its own GEMM instead of oneDNN. That is the faster
// way for a convolution and the slower one for a transposed convolution, which a 1x1 dgrad need not be.
bool is_small_pointwise(const Tensor& grad_output, const Tensor& weight, const Geometry& g) {
  constexpr std::array<int64_t, 2> ones = {1, 1}, zeros = {0, 0};
  return grad_output.is_cpu() && at::get_num_threads() == 1 && g.groups == 1 && g.stride == ones &&
         g.padding == zeros && weight.sym_size(2) == 1 && weight.sym_size(3) == 1 && grad_output.sym_size(0) < 16;
}

}  // namespace

// at::conv2d and not at::convolution: it is where torch decomposes complex convolutions.
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return at::conv2d_symint(input, weight, bias, sym(g.stride), sym(g.padding), sym(g.dilation), g.groups);
}

// dgrad is the transposed convolution, which needs no input tensor: convolution_backward would want one, if only for
// its size. output_padding restores the rows and columns at the end that no window reached.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_dgrad takes no complex grad_output, got ",
              grad_output.scalar_type());
  if (is_small_pointwise(grad_output, weight, g)) {
    return at::conv2d_symint(grad_output, weight.transpose(0, 1), {}, sym({1, 1}), sym({0, 0}), sym({1, 1}), 1);
  }
  SizeVector<c10::SymInt> output_padding;
  for (size_t i = 0; i < 2; ++i) {
    const c10::SymInt reached = (grad_output.sym_size(2 + i) - 1) * g.stride[i] - 2 * g.padding[i] +
                                g.dilation[i] * (weight.sym_size(2 + i) - 1) + 1;
    output_padding.push_back(input_size[2 + i] - reached);
  }
  return at::convolution_symint(grad_output, weight, /*bias=*/{}, sym(g.stride), sym(g.padding), sym(g.dilation),
                                /*transposed=*/true, output_padding, g.groups);
}

// ATen's interface wants a weight for its size and layout; this one is allocated and never read or written.
Tensor wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  TORCH_CHECK(!grad_output.is_complex(), "conv2d_wgrad takes no complex grad_output, got ",
              grad_output.scalar_type());
  const Tensor shape_only = at::empty_symint(weight_size, grad_output.options(), layout_of(grad_output, input));
  return std::get<1>(at::convolution_backward_symint(
      grad_output, input, shape_only, /*bias_sizes=*/std::nullopt, sym(g.stride), sym(g.padding), sym(g.dilation),
      /*transposed=*/false, /*output_padding=*/sym({0, 0}), g.groups, {false, true, false}));
}

}  // namespace freezekit::aten
