// db, the gradient of conv2d's bias: db[k] = sum over n, p, q of grad_output[n, k, p, q].
//
// It reads grad_output alone. ATen's is a sum; under freezekit's own kernels it is a reduction whose order depends on
// the sizes alone, so that the bits are the same whatever the layout of grad_output and the schedule of the device.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/backends/native.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/computing.h"

namespace freezekit {
namespace {

void check(const Tensor& grad_output) {
  check_operand(grad_output, "grad_output");
  check_rank(grad_output.sym_sizes(), "grad_output", "N, out_channels, P, Q");
}

Tensor channel_sums(const Tensor& grad_output) { return grad_output.sum({0, 2, 3}); }

Tensor bias_grad_kernel(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  const BelowAutogradAndAutocast below;
  const Backend demanded = parse_backend(backend);
  const bool own = route_step(Op::conv2d_bias_grad, demanded, grad_output).computer == Computer::kernels;
  return own ? native::bias_grad(grad_output, demanded) : channel_sums(grad_output);
}

Tensor bias_grad_meta(const Tensor& grad_output, std::string_view backend) {
  check(grad_output);
  parse_backend(backend);
  return at::empty_symint({grad_output.sym_size(1)}, grad_output.options());
}

// Every element of grad_output goes into one element of db, once.
struct BiasGradGradient {
  std::vector<c10::SymInt> size;

  auto fields() { return std::tie(size); }
  Link link() const { return {}; }
  variable_list gradients(const Tensor& grad, Kept, const Wanted&) const {
    return {grad.view({1, -1, 1, 1}).expand_symint(size)};
  }
};

Tensor bias_grad_entry(const Tensor& grad_output, std::string_view name) {
  check(grad_output);
  const Backend backend = parse_backend(name);
  if (route(Op::conv2d_bias_grad, backend, grad_output).computer == Computer::formula) return channel_sums(grad_output);
  const auto node =
      formula_node("FreezekitConv2dBiasGradBackward", BiasGradGradient{owned(grad_output.sym_sizes())}, grad_output);
  return recorded(node, [&] { return conv2d_bias_grad(grad_output, backend); });
}

}  // namespace

Tensor conv2d_bias_grad(const Tensor& grad_output, Backend backend) {
  static const auto op = find_operator<Tensor(const Tensor&, std::string_view)>("freezekit::conv2d_bias_grad");
  return op.call(grad_output, to_string(backend));
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def("conv2d_bias_grad(Tensor grad_output, *, str backend=\"auto\") -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_kernel); }
TORCH_LIBRARY_IMPL(freezekit, Meta, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_meta); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_entry); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("conv2d_bias_grad", freezekit::bias_grad_entry); }
