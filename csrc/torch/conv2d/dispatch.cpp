// Which backend computes an operator on tensors with data: ATen's libraries, or freezekit's own kernels.
#include <torch/library.h>

#include <array>

#include "torch/backends/aten.h"
#include "torch/backends/native.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/computing.h"
#include "torch/common/layout.h"
#include "torch/common/operators.h"
#include "torch/common/unseen.h"
#include "torch/conv2d/autograd.h"

namespace freezekit {
namespace {

using proof::Rehearsal;

Tensor conv2d_kernel(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  const auto output_size = check_conv2d(input, weight, bias, g);
  const Conv2dProblem problem = problem_of(input.sizes(), weight.sizes(), C10_AS_INTARRAYREF_SLOW(output_size), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(input, weight);
  const auto compute = [](Backend on, const Conv2dProblem& p, const Geometry& by, const Tensor& x, const Tensor& w,
                          const std::optional<Tensor>& b) {
    return on == Backend::aten ? aten::conv2d(x, w, b, by) : native::conv2d(p, x, w, b, by.with(on));
  };
  const auto beside = [&bias]() -> Conv2dStep::Beside { return {1, bias ? proof::largest_in(*bias) : 0}; };
  const Tensor y = computed(
      {Operator::fprop, problem, input, weight, layout, {}, beside}, g.backend,
      [&](Backend on) { return compute(on, problem, g, input, weight, bias); },
      [&](Backend on, const Rehearsal& own) {
        const auto b = own.is_biased ? std::make_optional(own.per_channel(own.dtype, input)) : std::nullopt;
        return compute(on, own.problem, own.geometry(g), own.x(input), own.weight(weight), b);
      });
  return finish(y, layout);
}

Tensor dgrad_kernel(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
  check_dgrad(grad_output, weight, input_size, g);
  const Conv2dProblem problem = problem_of(size, weight.sizes(), grad_output.sizes(), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(grad_output, weight);
  const auto compute = [](Backend on, const Conv2dProblem& p, const Geometry& by, const Tensor& dy, const Tensor& w,
                          SymIntArrayRef x_size) {
    return on == Backend::aten ? aten::dgrad(dy, w, x_size, by) : native::dgrad(p, dy, w, by.with(on));
  };
  const Tensor dx = computed(
      {Operator::dgrad, problem, grad_output, weight, layout}, g.backend,
      [&](Backend on) { return compute(on, problem, g, grad_output, weight, input_size); },
      [&](Backend on, const Rehearsal& own) {
        return compute(on, own.problem, own.geometry(g), own.y(grad_output), own.weight(weight), own.x_size());
      });
  return finish(dx, layout);
}

Tensor wgrad_kernel(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(weight_size);
  check_wgrad(grad_output, input, weight_size, g);
  const Conv2dProblem problem = problem_of(input.sizes(), size, grad_output.sizes(), g);
  const BelowAutogradAndAutocast below;
  const auto layout = layout_of(grad_output, input);
  const auto compute = [](Backend on, const Conv2dProblem& p, const Geometry& by, const Tensor& dy, const Tensor& x) {
    if (on != Backend::aten) return native::wgrad(p, dy, x, by.with(on));
    const std::array<c10::SymInt, 4> w_size = {p.k, p.c_per_group(), p.r, p.s};
    return aten::wgrad(dy, x, w_size, by);
  };
  const Tensor dw = computed(
      {Operator::wgrad, problem, grad_output, input, layout}, g.backend,
      [&](Backend on) { return compute(on, problem, g, grad_output, input); },
      [&](Backend on, const Rehearsal& own) {
        return compute(on, own.problem, own.geometry(g), own.y(grad_output), own.x(input));
      });
  return finish(dw, layout);
}

}  // namespace

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  if (reaches_kernel(input, weight, bias ? *bias : weight)) return conv2d_kernel(input, weight, bias, g);
  static const Conv2dOperator op("freezekit::conv2d");
  return op(input, weight, bias, g);
}

// Sizes are those of a forward pass, and whoever got them elsewhere has checked them: ATen, which compares them again, is
// asked at once. Freezekit's kernels trust nobody. What reaches a kernel past the dispatcher is plain, on a CPU.
Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g,
                    at::MemoryFormat layout) {
  if (reaches_kernel(grad_output, weight)) {
    if (!is_left_to_aten(g.backend, grad_output)) {
      return in_layout(dgrad_kernel(grad_output, weight, input_size, g), layout);
    }
    const BelowAutogradAndAutocast below;
    TORCH_CHECK(!grad_output.is_complex(), "conv2d_dgrad takes no complex grad_output, got ",
                grad_output.scalar_type());
    return finish(aten::dgrad_on_cpu(grad_output, weight, input_size, layout, aten::convolution_of(g)), layout);
  }
  static const Conv2dGradOperator op("freezekit::conv2d_dgrad");
  return in_layout(op(grad_output, weight, input_size, g), layout);
}

Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  return conv2d_dgrad(grad_output, weight, input_size, g, layout_of(grad_output, weight));
}

Tensor conv2d_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  if (reaches_kernel(grad_output, input)) {
    if (!is_left_to_aten(g.backend, grad_output)) return wgrad_kernel(grad_output, input, weight_size, g);
    const BelowAutogradAndAutocast below;
    return finish(aten::wgrad(grad_output, input, weight_size, g), layout_of(grad_output, input));
  }
  static const Conv2dGradOperator op("freezekit::conv2d_wgrad");
  return op(grad_output, input, weight_size, g);
}

// One kernel for every device with data: `backend` decides, not the device's own library.
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("conv2d", Conv2dOperator::kernel<conv2d_kernel>);
  m.impl("conv2d_dgrad", Conv2dGradOperator::kernel<dgrad_kernel>);
  m.impl("conv2d_wgrad", Conv2dGradOperator::kernel<wgrad_kernel>);
}

}  // namespace freezekit
