// Shapes and strides without data: what tracing, torch.compile and the meta device see.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

Tensor empty(SymIntArrayRef size, const Tensor& a, const Tensor& b) {
  return at::empty_symint(size, a.options(), layout_of(a, b));
}

Tensor conv2d_meta(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  return empty(check_conv2d(input, weight, bias, g), input, weight);
}

Tensor dgrad_meta(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  check_dgrad(grad_output, weight, input_size, g);
  return empty(input_size, grad_output, weight);
}

Tensor wgrad_meta(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  check_wgrad(grad_output, input, weight_size, g);
  return empty(weight_size, grad_output, input);
}

}  // namespace

TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("conv2d", Conv2dOperator::kernel<conv2d_meta>);
  m.impl("conv2d_dgrad", Conv2dGradOperator::kernel<dgrad_meta>);
  m.impl("conv2d_wgrad", Conv2dGradOperator::kernel<wgrad_meta>);
}

}  // namespace freezekit
