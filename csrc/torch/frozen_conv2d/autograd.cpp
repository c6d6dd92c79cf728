// Autograd, autocast and transforms of a frozen convolution. What its backward pass does is in node.h.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/autograd/node.h"
#include "torch/backends/aten.h"
#include "torch/backends/route.h"
#include "torch/bits/gate.h"
#include "torch/common/autocast.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"
#include "torch/frozen_conv2d/node.h"

namespace freezekit {
namespace {

void check_frozen(const Tensor& tensor, const char* name) {
  TORCH_CHECK(!tensor.defined() || !tensor.requires_grad() || !at::GradMode::is_enabled(), name,
              " must not require grad: frozen_conv2d has no gradient for it; conv2d has");
}

void check_formula_backend(const FrozenConv2d& f) {
  if (f.own_kernels()) refuse("frozen_conv2d", f.geometry.backend, "it has no formulas for torch.func transforms");
}

// By ATen's formulas, for torch.func transforms and forward-mode AD.
Tensor by_aten(const FrozenOperands& o, const FrozenConv2d& f) {
  const FixedNormTensors& n = o.norm;
  const bool same = o.bias.defined() && o.bias.scalar_type() == o.input.scalar_type();
  Tensor y = aten::conv2d(o.input, o.weight, same ? optional_of(o.bias) : std::nullopt, f.geometry);
  if (o.bias.defined() && !same) y = (y + o.bias.view({1, -1, 1, 1})).to(y.scalar_type());
  if (n.defined()) {
    y = at::batch_norm(y, optional_of(n.gamma), optional_of(n.beta), optional_of(n.mean), optional_of(n.var),
                       /*training=*/false, /*momentum=*/0, n.eps, /*cudnn_enabled=*/false);
  }
  if (o.residual.defined()) y = y + o.residual;
  if (f.activation == FrozenConv2d::Activation::relu) return at::relu(y);
  return f.activation == FrozenConv2d::Activation::relu6 ? at::hardtanh(y, 0, 6) : y;
}

bool needs_formulas(const FrozenOperands& o) {
  const FixedNormTensors& n = o.norm;
  for (const Tensor* t : {&o.input, &o.weight, &o.bias, &o.residual, &n.gamma, &n.beta, &n.mean, &n.var}) {
    if (t->defined() && obstacle_in(*t)) return true;
  }
  return false;
}

// What autocast does to the operands of a convolution. A bias and a norm are applied as they are, before the result is
// rounded.
FrozenOperands low_precision(FrozenOperands o, const Autocast& cast) {
  for (Tensor* tensor : {&o.input, &o.weight, &o.residual}) *tensor = cast(*tensor);
  if (o.bias.defined() && o.bias.scalar_type() != at::kFloat) o.bias = cast(o.bias);
  return o;
}

struct Result {
  Tensor y, bits, input;
};

Result record(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask, bool share) {
  check_frozen(o.weight, "weight"), check_frozen(o.bias, "bias");
  check_frozen(o.norm.gamma, "norm_weight"), check_frozen(o.norm.beta, "norm_bias");
  check_frozen(o.norm.mean, "running_mean"), check_frozen(o.norm.var, "running_var");
  if (needs_formulas(o)) {
    check_formula_backend(f);
    TORCH_CHECK(!keep_mask, "keep_mask must be False under torch.func transforms and forward-mode AD");
    return {by_aten(o, f), no_bits(o.input), o.input};
  }
  const bool with_residual = o.residual.defined();
  const bool needed = with_residual ? torch::autograd::compute_requires_grad(o.input, o.residual)
                                    : torch::autograd::compute_requires_grad(o.input);
  if (needed && !keep_mask && f.has_mask() && !f.own_kernels() &&
      route(Op::frozen_conv2d, f.geometry.backend, o.input, o.residual).computer == Computer::formula) {
    // Bits that no kernel packs cost more passes than they save bytes.
    return {by_aten(o, f), no_bits(o.input), o.input};
  }
  NodePtr<FrozenConv2dBackward> node;
  if (needed) {
    const bool channels_last = layout_of(o.input, o.weight) == at::MemoryFormat::ChannelsLast;
    node = make_node<FrozenConv2dBackward>(f, o.input.sym_sizes(), channels_last, o.weight, o.norm);
    node->set_next_edges(with_residual ? torch::autograd::collect_next_edges(o.input, o.residual)
                                       : torch::autograd::collect_next_edges(o.input));
  }
  auto [y, bits] = below_autograd([&] { return frozen_conv2d(o, f, keep_mask || needed); });
  if (!needed) return {y, bits, o.input};
  node->keep_bits(y, bits);
  torch::autograd::set_history(y, node);
  if (!share || !o.input.requires_grad()) return {y, bits, o.input};
  Tensor passed = o.input.detach();  // shares storage and version counter
  torch::autograd::set_history(passed, node);
  return {y, bits, passed};
}

std::tuple<Tensor, Tensor> frozen_autograd(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  const Result result = record(o, f, keep_mask, /*share=*/false);
  return {result.y, result.bits};
}

Tensor frozen_dgrad_autograd(const FrozenGradCall& call) {
  const auto& [o, g] = call;
  check_frozen(o.weight, "weight");
  check_frozen(o.norm.gamma, "norm_weight"), check_frozen(o.norm.var, "running_var");
  const Tensor& r = o.residual;
  const bool transformed = obstacle_in(o.grad_output) || (r.defined() && obstacle_in(r));
  if (!transformed && !torch::autograd::compute_requires_grad(o.grad_output, r)) {
    return below_autograd([&] { return frozen_conv2d_dgrad(o, g); });
  }
  check_dgrad(o.grad_output, o.weight, o.input_size, g);
  Tensor dy = o.grad_output;
  if (o.grad_mask.defined()) dy = gate(dy, o.grad_mask, {dy.sym_strides(), GateRule(), Backend::automatic});
  Tensor dx = conv2d_dgrad(scaled_by_norm(dy, o.norm), o.weight, o.input_size, g);
  if (r.defined()) dx = dx + r;
  if (o.mask.defined()) {
    const auto stride = dense_stride(o.input_size, o.channels_last || is_own(g.backend));
    dx = gate(dx, o.mask, {stride, GateRule(), Backend::automatic});
  }
  return dx.contiguous(format_of(o.channels_last));
}

// (y, input), the latter for the input's other readers. Autocast skips composite operators, so it is asked here.
std::tuple<Tensor, Tensor> frozen_shared(const FrozenCall& arguments) {
  const auto& [o, f] = arguments;
  const c10::DeviceType device = o.input.device().type();
  // Autocast does not know the meta device, on which models are explained, and raises when asked.
  const bool casts = device != c10::DeviceType::Meta && at::autocast::is_autocast_enabled(device);
  const auto cast = casts ? std::optional<Autocast>(std::in_place, o.input) : std::nullopt;
  const FrozenOperands call = cast ? low_precision(o, *cast) : o;
  // The copy that a cast made is not what the other readers read.
  const bool share = call.input.is_same(o.input);
  const Result result = record(call, f, /*keep_mask=*/false, share);
  return {result.y, share ? result.input : o.input};
}

std::tuple<Tensor, Tensor> frozen_autocast(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  const Autocast cast(o.input);
  return frozen_conv2d(low_precision(o, cast), f, keep_mask);
}

std::tuple<Tensor, Tensor> frozen_batched(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  TORCH_CHECK(!keep_mask, "keep_mask must be False under torch.vmap");
  check_formula_backend(f);
  const Tensor y = by_aten(o, f);
  return {y, no_bits(y)};
}

}  // namespace

std::tuple<Tensor, Tensor> frozen_conv2d_shared(const FrozenOperands& o, const FrozenConv2d& f) {
  static const FrozenSharedOperator op("freezekit::frozen_conv2d_shared");
  return op({o, f});
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  // Not for torch.compile, which has no operators whose results are their inputs; it sums in its own kernels.
  m.def(
      "frozen_conv2d_shared(Tensor(a) input, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
      "str activation=\"none\", SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? running_mean=None, Tensor? running_var=None, "
      "float eps=0.0, str backend=\"auto\") -> (Tensor, Tensor(a))");
}
TORCH_LIBRARY_IMPL(freezekit, CompositeImplicitAutograd, m) {
  m.impl("frozen_conv2d_shared", freezekit::FrozenSharedOperator::kernel<freezekit::frozen_shared>);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_autograd>);
  m.impl("frozen_conv2d_dgrad", freezekit::FrozenGradOperator::kernel<freezekit::frozen_dgrad_autograd>);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_autocast>);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_autocast>);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_batched>);
}
