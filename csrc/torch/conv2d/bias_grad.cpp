// db, the gradient of conv2d's bias: db[k] = sum over n, p, q of grad_output[n, k, p, q].
//
// It reads grad_output alone. ATen's is a sum; under freezekit's own kernels it is a reduction whose order depends on
// the sizes alone, so that the bits are the same whatever the layout of grad_output and the schedule of the device.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/common/checks.h"
#include "torch/common/computing.h"
#include "torch/autograd/formula.h"
#include "torch/backends/native.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

constexpr const char* kFormulaOnly =
    "tensors of torch.func transforms, of forward-mode AD, complex or integer ones";

void check(const Tensor& grad_output) {
  check_operand(grad_output, "grad_output");
  check_rank(grad_output.sym_sizes(), "grad_output", "N, out_channels, P, Q");
}

Tensor channel_sums(const Tensor& grad_output) { return grad_output.sum({0, 2, 3}); }

Tensor bias_grad_kernel(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  const BelowAutogradAndAutocast below;
  const Backend on = parse_backend(backend);
  return native::runs(grad_output, on) ? native::bias_grad(grad_output, on) : channel_sums(grad_output);
}

Tensor bias_grad_meta(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  parse_backend(backend);
  return at::empty_symint({grad_output.sym_size(1)}, grad_output.options());
}

Tensor bias_grad_batched(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  check_formula_backend(parse_backend(backend), "batched tensors of vmap");
  return channel_sums(grad_output);
}

// Every element of grad_output goes into one element of db, once.
variable_list backward(const Tensor& grad, const variable_list&, const Settings& settings, const std::vector<bool>&) {
  return {grad.view({1, -1, 1, 1}).expand_symint(settings.sizes[0])};
}

Tensor bias_grad_autograd(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  if (needs_aten(grad_output)) {
    check_formula_backend(parse_backend(backend), kFormulaOnly);
    return channel_sums(grad_output);
  }
  const auto node = formula_node<backward>("FreezekitConv2dBiasGradBackward",
                                           {{}, {owned(grad_output.sym_sizes())}}, grad_output);
  Tensor db = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return conv2d_bias_grad(grad_output, parse_backend(backend));
  }();
  if (node) torch::autograd::set_history(db, node);
  return db;
}

}  // namespace

Tensor conv2d_bias_grad(const Tensor& grad_output, Backend backend) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("freezekit::conv2d_bias_grad", "")
                             .typed<Tensor(const Tensor&, std::string_view)>();
  return op.call(grad_output, to_string(backend));
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def("conv2d_bias_grad(Tensor grad_output, *, str backend=\"auto\") -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_kernel); }
TORCH_LIBRARY_IMPL(freezekit, Meta, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_meta); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_autograd); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_batched); }
