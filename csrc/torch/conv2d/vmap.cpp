// Under vmap the operators are ATen's, which have batching rules.
#include <torch/library.h>

#include "torch/backends/aten.h"
#include "torch/common/checks.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

Tensor conv2d_batched(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  check_conv2d<c10::SymInt>(input, weight, bias, g);
  check_formula_backend(g.backend, "batched tensors of vmap");
  return aten::conv2d(input, weight, bias, g);
}

Tensor dgrad_batched(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride,
                     IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  check_dgrad<c10::SymInt>(grad_output, weight, input_size, g);
  check_formula_backend(g.backend, "batched tensors of vmap");
  return aten::dgrad(grad_output, weight, input_size, g);
}

Tensor wgrad_batched(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, IntArrayRef stride,
                     IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  check_wgrad<c10::SymInt>(grad_output, input, weight_size, g);
  check_formula_backend(g.backend, "batched tensors of vmap");
  return aten::wgrad(grad_output, input, weight_size, g);
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) {
  m.impl("conv2d", freezekit::conv2d_batched);
  m.impl("conv2d_dgrad", freezekit::dgrad_batched);
  m.impl("conv2d_wgrad", freezekit::wgrad_batched);
}
