// Autograd, autocast and transforms of a frozen convolution. What its backward pass does stands in frozen_node.h.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "torch/backends/aten.h"
#include "torch/common/checks.h"
#include "torch/common/constants.h"
#include "torch/autograd/formula.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"
#include "torch/frozen_conv2d/node.h"
#include "torch/bits/gate.h"
#include "torch/common/route.h"
#include "torch/autograd/node.h"

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
Tensor by_aten(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& residual,
               const FrozenConv2d& f) {
  const bool same = bias && bias->defined() && bias->scalar_type() == input.scalar_type();
  Tensor y = aten::conv2d(input, weight, same ? bias : std::nullopt, f.geometry);
  if (bias && bias->defined() && !same) y = (y + bias->view({1, -1, 1, 1})).to(y.scalar_type());
  if (residual.defined()) y = y + residual;
  if (f.activation == FrozenConv2d::Activation::relu) return at::relu(y);
  return f.activation == FrozenConv2d::Activation::relu6 ? at::hardtanh(y, 0, 6) : y;
}

Tensor no_bits(const Tensor& like) { return at::empty({0}, like.options().dtype(at::kInt)); }

struct Call {
  Tensor input, weight, bias, residual;

  bool needs_aten() const {
    const auto transformed = [](const Tensor& t) { return t.defined() && obstacle_in(t); };
    return transformed(input) || transformed(weight) || transformed(bias) || transformed(residual);
  }
  std::optional<Tensor> optional_bias() const { return bias.defined() ? std::make_optional(bias) : std::nullopt; }
  std::optional<Tensor> optional_residual() const {
    return residual.defined() ? std::make_optional(residual) : std::nullopt;
  }
};

// What autocast does to the operands of a convolution; forms of declared constants are cast once. A float32 bias is added
// as it is, before the result is rounded.
Call low_precision(const Call& call, c10::DeviceType device) {
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  const auto cast = [&](const Tensor& tensor) {
    return tensor.defined() ? at::autocast::cached_cast(dtype, tensor, device) : tensor;
  };
  const auto constant = [&](const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    return constants::derived(tensor, {"cast", static_cast<int64_t>(dtype)}, [dtype, device](const Tensor& source) {
      return at::autocast::cached_cast(dtype, source, device);
    });
  };
  return {cast(call.input), constant(call.weight), call.bias, cast(call.residual)};
}

struct Result {
  Tensor y, bits, input;
};

Result record(const Call& call, const FrozenConv2d& f, bool keep_mask, bool share) {
  check_frozen(call.weight, "weight");
  check_frozen(call.bias, "bias");
  if (call.needs_aten()) {
    check_formula_backend(f);
    TORCH_CHECK(!keep_mask, "keep_mask must be False under torch.func transforms and forward-mode AD");
    return {by_aten(call.input, call.weight, call.optional_bias(), call.residual, f), no_bits(call.input), call.input};
  }
  const bool with_residual = call.residual.defined();
  const bool needed = with_residual ? torch::autograd::compute_requires_grad(call.input, call.residual)
                                    : torch::autograd::compute_requires_grad(call.input);
  NodePtr<FrozenConv2dBackward> node;
  if (needed) {
    node = make_node<FrozenConv2dBackward>(f, call.input, call.weight);
    node->set_next_edges(with_residual ? torch::autograd::collect_next_edges(call.input, call.residual)
                                       : torch::autograd::collect_next_edges(call.input));
  }
  auto [y, bits] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return frozen_conv2d(call.input, call.weight, call.optional_bias(), call.optional_residual(), f,
                         keep_mask || needed);
  }();
  if (!needed) return {y, bits, call.input};
  node->keep(y, bits);
  torch::autograd::set_history(y, node);
  if (!share || !call.input.requires_grad()) return {y, bits, call.input};
  Tensor passed = call.input.detach();  // shares storage and version counter
  torch::autograd::set_history(passed, node);
  return {y, bits, passed};
}

std::tuple<Tensor, Tensor> frozen_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, std::string_view activation,
                                           SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                           c10::SymInt groups, std::optional<bool> channels_last,
                                           bool keep_mask, std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  const Result result =
      record({input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())}, f, keep_mask, /*share=*/false);
  return {result.y, result.bits};
}

Tensor frozen_dgrad_autograd(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                             const std::optional<Tensor>& residual, const std::optional<Tensor>& mask,
                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                             bool channels_last, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  const Tensor r = residual.value_or(Tensor()), bits = mask.value_or(Tensor());
  check_frozen(weight, "weight");
  const bool transformed = obstacle_in(grad_output) || (r.defined() && obstacle_in(r));
  if (!transformed && !torch::autograd::compute_requires_grad(grad_output, r)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return frozen_conv2d_dgrad(grad_output, weight, input_size, r, bits, channels_last, g);
  }
  Tensor dx = conv2d_dgrad(grad_output, weight, input_size, g);
  if (r.defined()) dx = dx + r;
  const bool last = channels_last || g.backend == Backend::native || g.backend == Backend::emulated;
  if (bits.defined()) dx = gate(dx, bits, {dense_stride(input_size, last), GateRule(), Backend::automatic});
  return dx.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// (y, input), the latter for the input's other readers. Autocast has no say in a composite operator, so it is asked here.
std::tuple<Tensor, Tensor> frozen_shared(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, std::string_view activation,
                                         SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                                         std::optional<bool> channels_last, std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  Call call{input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())};
  const c10::DeviceType device = input.device().type();
  // Autocast does not know the meta device, on which models are explained, and raises when asked.
  const bool casts = device != c10::DeviceType::Meta && at::autocast::is_autocast_enabled(device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(casts ? c10::autocast_dispatch_keyset : c10::DispatchKeySet());
  if (casts) call = low_precision(call, device);
  // The copy that a cast made is not what the other readers read.
  const bool share = call.input.is_same(input);
  const Result result = record(call, f, /*keep_mask=*/false, share);
  return {result.y, share ? result.input : input};
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
std::tuple<Tensor, Tensor> frozen_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, std::string_view activation,
                                           SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                           c10::SymInt groups, std::optional<bool> channels_last,
                                           bool keep_mask, std::string_view backend) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const Call call = low_precision({input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())}, kDevice);
  return frozen_conv2d(call.input, call.weight, call.optional_bias(), call.optional_residual(),
                       FrozenConv2d(activation, channels_last, Geometry(stride, padding, dilation, groups, backend)),
                       keep_mask);
}

std::tuple<Tensor, Tensor> frozen_batched(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& residual, std::string_view activation,
                                          SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                          c10::SymInt groups, std::optional<bool> channels_last, bool keep_mask,
                                          std::string_view backend) {
  TORCH_CHECK(!keep_mask, "keep_mask must be False under torch.vmap");
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  check_formula_backend(f);
  const Tensor y = by_aten(input, weight, bias, residual.value_or(Tensor()), f);
  return {y, no_bits(y)};
}

}  // namespace

std::tuple<Tensor, Tensor> frozen_conv2d_shared(const Tensor& input, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const FrozenConv2d& f) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("freezekit::frozen_conv2d_shared", "")
                             .typed<decltype(frozen_shared)>();
  const Geometry& g = f.geometry;
  return op.call(input, weight, bias, residual, to_string(f.activation), g.stride, g.padding, g.dilation, g.groups,
                 f.channels_last, to_string(g.backend));
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  // Not for torch.compile, which has no operators whose results are their inputs; it sums in its own kernels.
  m.def(
      "frozen_conv2d_shared(Tensor(a) input, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
      "str activation=\"none\", SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, "
      "bool? channels_last=None, str backend=\"auto\") -> (Tensor, Tensor(a))");
}
TORCH_LIBRARY_IMPL(freezekit, CompositeImplicitAutograd, m) { m.impl("frozen_conv2d_shared", freezekit::frozen_shared); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("frozen_conv2d", freezekit::frozen_autograd);
  m.impl("frozen_conv2d_dgrad", freezekit::frozen_dgrad_autograd);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) {
  m.impl("frozen_conv2d", freezekit::frozen_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) {
  m.impl("frozen_conv2d", freezekit::frozen_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("frozen_conv2d", freezekit::frozen_batched); }
