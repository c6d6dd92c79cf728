// Which backend computes an operator on tensors with data: ATen's libraries, or freezekit's own kernels.
#include <torch/library.h>

#include "torch/backends/aten.h"
#include "torch/backends/native.h"
#include "torch/common/checks.h"
#include "torch/common/computing.h"
#include "torch/common/layout.h"
#include "torch/common/route.h"

namespace freezekit {
namespace {

Tensor conv2d_kernel(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  const auto output_size = check_conv2d(input, weight, bias, g);
  const Conv2dProblem problem = problem_of(input.sizes(), weight.sizes(), C10_AS_INTARRAYREF_SLOW(output_size), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(input, weight);
  const Tensor y = computed({Operator::fprop, problem, input, layout}, g.backend, [&](Backend on) {
    return on == Backend::aten ? aten::conv2d(input, weight, bias, g)
                               : native::conv2d(problem, input, weight, bias, g.with(on));
  });
  return finish(y, layout);
}

Tensor dgrad_kernel(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
  check_dgrad(grad_output, weight, input_size, g);
  const Conv2dProblem problem = problem_of(size, weight.sizes(), grad_output.sizes(), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(grad_output, weight);
  const Tensor dx = computed({Operator::dgrad, problem, grad_output, layout}, g.backend, [&](Backend on) {
    return on == Backend::aten ? aten::dgrad(grad_output, weight, input_size, g)
                               : native::dgrad(problem, grad_output, weight, g.with(on));
  });
  return finish(dx, layout);
}

Tensor wgrad_kernel(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(weight_size);
  check_wgrad(grad_output, input, weight_size, g);
  const Conv2dProblem problem = problem_of(input.sizes(), size, grad_output.sizes(), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(grad_output, input);
  const Tensor dw = computed({Operator::wgrad, problem, grad_output, layout}, g.backend, [&](Backend on) {
    return on == Backend::aten ? aten::wgrad(grad_output, input, weight_size, g)
                               : native::wgrad(problem, grad_output, input, g.with(on));
  });
  return finish(dw, layout);
}

}  // namespace

// One kernel for every device with data: `backend` decides, not the device's own library.
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("conv2d", Conv2dOperator::kernel<conv2d_kernel>);
  m.impl("conv2d_dgrad", Conv2dGradOperator::kernel<dgrad_kernel>);
  m.impl("conv2d_wgrad", Conv2dGradOperator::kernel<wgrad_kernel>);
}

}  // namespace freezekit
