// Autograd of a frozen convolution, and how neighbouring ones share their passes.
//
// A node keeps bits and the weight, no activation. In the backward pass it looks along the edge to who made its input:
//
//   - if that is a frozen convolution with bits, its bits go into this one's dgrad as the mask, in the same kernel;
//     the result is marked there, and the maker leaves out the pass that masks its own dy. Whether a mark still holds
//     is asked of the tensor that arrives: a sum, a hook's result or an edited tensor is not the marked one, and is masked
//     (again, which does no harm). So nothing depends on knowing who else reads the maker's output.
//   - no mask is lent where somebody looks at that gradient (a hook, retain_grad, autograd.grad for it): dL/dy of an
//     activation is not zero where the activation is.
//
// `frozen_conv2d_shared` also returns its input, for the other readers of it: what flows back to them reaches this node
// and is added in dgrad's epilogue, where autograd would sum in a pass of its own.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "torch/aten.h"
#include "torch/checks.h"
#include "torch/constants.h"
#include "torch/formula.h"
#include "torch/frozen_conv2d.h"
#include "torch/gate.h"
#include "torch/layout.h"
#include "torch/node.h"

namespace freezekit {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;

constexpr size_t kInput = 0, kResidual = 1;  // edges
constexpr size_t kPassedOn = 1;              // the gradient of the input that was passed on

class FrozenConv2dBackward : public Node {
 public:
  FrozenConv2dBackward(FrozenConv2d f, const Tensor& input, const Tensor& weight)
      : f_(std::move(f)), input_size_(owned(input.sym_sizes())), weight_(weight, /*is_output=*/false) {
    input_is_channels_last_ = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  }

  // After the forward pass: the bits and how they lie.
  void keep(const Tensor& y, const Tensor& bits) {
    if (bits.sym_numel() == 0) return;
    const bool last = f_.own_kernels() || y.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    bits_stride_ = dense_stride(y.sym_sizes(), last);
    bits_are_channels_last_ = last;
    bits_ = SavedVariable(bits, /*is_output=*/false);
    has_bits_ = true;
  }

  std::string name() const override { return "FreezekitFrozenConv2dBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    weight_.reset_data();
    bits_.reset_data();
    masked_.reset();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(num_outputs());
    const Tensor passed = grads.size() > kPassedOn ? std::move(grads[kPassedOn]) : Tensor();
    const bool wants_input = task_should_compute_output(kInput);
    if (!grads[0].defined()) {
      if (wants_input) result[kInput] = passed;
      return result;
    }
    const Tensor dy = masked(std::move(grads[0]));
    if (num_outputs() > kResidual && task_should_compute_output(kResidual)) result[kResidual] = dy;
    if (wants_input) result[kInput] = input_gradient(dy, passed);
    return result;
  }

 private:
  // dy where this one's activation let the value through.
  Tensor masked(Tensor&& dy) {
    if (!has_bits_) return std::move(dy);
    const bool known = is_marked(dy);
    masked_.reset();
    if (known) return std::move(dy);
    const Tensor bits = bits_.unpack();
    if (may_write(dy)) {
      gate_inplace(dy, bits, {}, "auto");
      return std::move(dy);
    }
    return gate(dy, bits, bits_stride_, {}, to_string(f_.geometry.backend));
  }

  Tensor input_gradient(const Tensor& dy, const Tensor& passed) {
    const Tensor weight = weight_.unpack();
    if (at::GradMode::is_enabled()) {  // create_graph: of differentiable operators, masks where they are made
      const Tensor dx = conv2d_dgrad(dy, weight, input_size_, f_.geometry);
      return passed.defined() ? dx + passed : dx;
    }
    FrozenConv2dBackward* maker = maker_of_input();
    const Tensor bits = maker ? maker->lend() : Tensor();
    const Tensor dx =
        frozen_conv2d_dgrad(dy, weight, input_size_, passed, bits, input_is_channels_last_, f_.geometry);
    if (bits.defined()) maker->mark(dx);
    return dx;
  }

  // Who made the input, if its gradient is nobody else's business and its bits lie as this dgrad computes.
  FrozenConv2dBackward* maker_of_input() const {
    const auto& edge = next_edge(kInput);
    auto* maker = dynamic_cast<FrozenConv2dBackward*>(edge.function.get());
    if (!maker || edge.input_nr != 0 || !maker->has_bits_) return nullptr;
    if (maker->bits_are_channels_last_ != (f_.own_kernels() || input_is_channels_last_)) return nullptr;
    if (!maker->tensor_pre_hooks().empty() || !maker->pre_hooks().empty() || !maker->retains_grad_hooks().empty()) {
      return nullptr;
    }
    if (const auto* tasks = torch::autograd::get_current_graph_task_exec_info()) {
      const auto found = tasks->find(maker);
      if (found != tasks->end() && found->second.captures_) return nullptr;
    }
    return maker;
  }

  Tensor lend() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bits_.unpack();
  }

  void mark(const Tensor& grad) {
    const std::lock_guard<std::mutex> lock(mutex_);
    masked_.emplace(grad.getIntrusivePtr());
    masked_version_ = grad._version();
  }

  bool is_marked(const Tensor& grad) const {
    // While the weak pointer is held no other tensor can take the address.
    return masked_ && masked_->_unsafe_get_target() == grad.unsafeGetTensorImpl() && grad._version() == masked_version_;
  }

  bool may_write(const Tensor& dy) const {
    return !at::GradMode::is_enabled() && dy.use_count() == 1 && !at::isTensorSubclassLike(dy) && dy.has_storage() &&
           dy.storage().use_count() == 1 && dy.sym_strides() == SymIntArrayRef(bits_stride_) &&
           dy.is_non_overlapping_and_dense();
  }

  FrozenConv2d f_;
  std::vector<c10::SymInt> input_size_, bits_stride_;
  bool input_is_channels_last_ = false, bits_are_channels_last_ = false, has_bits_ = false;
  SavedVariable weight_, bits_;
  std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> masked_;
  uint32_t masked_version_ = 0;
};

void check_frozen(const Tensor& tensor, const char* name) {
  TORCH_CHECK(!tensor.defined() || !tensor.requires_grad() || !at::GradMode::is_enabled(), name,
              " must not require grad: frozen_conv2d has no gradient for it; conv2d has");
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
    const auto transformed = [](const Tensor& t) { return t.defined() && freezekit::needs_aten(t); };
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
                                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                           int64_t groups, std::optional<bool> channels_last,
                                           bool keep_mask, std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  const Result result =
      record({input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())}, f, keep_mask, /*share=*/false);
  return {result.y, result.bits};
}

Tensor frozen_dgrad_autograd(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                             const std::optional<Tensor>& residual, const std::optional<Tensor>& mask,
                             IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                             bool channels_last, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  const Tensor r = residual.value_or(Tensor()), bits = mask.value_or(Tensor());
  check_frozen(weight, "weight");
  const bool transformed = needs_aten(grad_output) || (r.defined() && needs_aten(r));
  if (!transformed && !torch::autograd::compute_requires_grad(grad_output, r)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return frozen_conv2d_dgrad(grad_output, weight, input_size, r, bits, channels_last, g);
  }
  Tensor dx = conv2d_dgrad(grad_output, weight, input_size, g);
  if (r.defined()) dx = dx + r;
  const bool last = channels_last || g.backend == Backend::native || g.backend == Backend::emulated;
  if (bits.defined()) dx = gate(dx, bits, dense_stride(input_size, last), {}, "auto");
  return dx.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// (y, input), the latter for the input's other readers. Autocast has no say in a composite operator, so it is asked here.
std::tuple<Tensor, Tensor> frozen_shared(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, std::string_view activation,
                                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                         std::optional<bool> channels_last, std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  Call call{input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())};
  const c10::DeviceType device = input.device().type();
  const bool casts = at::autocast::is_autocast_enabled(device);
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
                                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                           int64_t groups, std::optional<bool> channels_last,
                                           bool keep_mask, std::string_view backend) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const Call call = low_precision({input, weight, bias.value_or(Tensor()), residual.value_or(Tensor())}, kDevice);
  return frozen_conv2d(call.input, call.weight, call.optional_bias(), call.optional_residual(),
                       FrozenConv2d(activation, channels_last, Geometry(stride, padding, dilation, groups, backend)),
                       keep_mask);
}

std::tuple<Tensor, Tensor> frozen_batched(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& residual, std::string_view activation,
                                          IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                          int64_t groups, std::optional<bool> channels_last, bool keep_mask,
                                          std::string_view backend) {
  TORCH_CHECK(!keep_mask, "keep_mask must be False under torch.vmap");
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  const Tensor y = by_aten(input, weight, bias, residual.value_or(Tensor()), f);
  return {y, no_bits(y)};
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  // Not for torch.compile, which has no operators whose results are their inputs; it sums in its own kernels.
  m.def(
      "frozen_conv2d_shared(Tensor(a) input, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
      "str activation=\"none\", int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, *, "
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
