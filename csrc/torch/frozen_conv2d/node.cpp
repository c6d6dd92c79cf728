#include "torch/frozen_conv2d/node.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/graph_task.h>

#include "torch/common/layout.h"

namespace freezekit {
namespace {

constexpr size_t kInput = 0, kResidual = 1;  // edges
constexpr size_t kPassedOn = 1;              // the gradient of the input that was passed on

Tensor passed_on(const variable_list& grads) { return grads.size() > kPassedOn ? grads[kPassedOn] : Tensor(); }

}  // namespace

FixedNormTensors FrozenGradients::norm(Kept kept) const {
  if (!has_norm) return {};
  return {kept(kGamma), Tensor(), Tensor(), kept(kVar), eps};
}

Tensor FrozenGradients::input_gradient(const Tensor& dy, const Tensor& weight, const FixedNormTensors& norm,
                                       const Tensor& passed) const {
  const Tensor dx = conv2d_dgrad(scaled_by_norm(dy, norm), weight, input_size, geometry);
  return passed.defined() ? passed + dx : dx;
}

variable_list FrozenGradients::of_all(const variable_list& grads, Kept kept, const Wanted& wanted) const {
  variable_list result(wanted.size());
  if (!grads[0].defined()) {
    if (wanted[kInput]) result[kInput] = passed_on(grads);
    return result;
  }
  Tensor dy = grads[0];
  if (has_result) {
    dy = at::threshold_backward(dy, kept(kResult), 0);
  } else if (has_bits) {
    dy = gate(dy, kept(kBits), {bits_stride, GateRule(), geometry.backend});
  }
  if (wanted.size() > kResidual && wanted[kResidual]) result[kResidual] = dy;
  if (wanted[kInput]) result[kInput] = input_gradient(dy, kept(kWeight), norm(kept), passed_on(grads));
  return result;
}

// On a CPU a mask is a pass of its own wherever it is applied, and the one that scales dy can do it too.
FrozenConv2dBackward::FrozenConv2dBackward(const FrozenConv2d& f, SymIntArrayRef input_size, bool dx_is_channels_last,
                                           const Tensor& weight, const FixedNormTensors& norm)
    : CompiledNode("FreezekitFrozenConv2dBackward", {f.geometry, owned(input_size), {}, norm.eps, norm.defined()}),
      activation_(f.activation), dx_is_channels_last_(dx_is_channels_last),
      masks_in_dgrad_(weight.is_cpu() && !f.own_kernels()) {
  kept_.reserve(FrozenGradients::kKept);
  keep(weight, norm.gamma, norm.var);
  kept_.resize(FrozenGradients::kKept);
}

void FrozenConv2dBackward::keep_bits(const Tensor& y, const Tensor& bits) {
  if (activation_ == FrozenConv2d::Activation::none) return;
  operand_.is_first = activation_ == FrozenConv2d::Activation::relu;
  operand_.stride.assign(y.sym_strides().begin(), y.sym_strides().end());
  bits_are_channels_last_ = owns_kernels() || y.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  formula_.bits_stride = dense_stride(y.sym_sizes(), bits_are_channels_last_);
  kept_[FrozenGradients::kBits] = KeptTensor(bits);
  formula_.has_bits = true;
  if (!y.has_storage()) return;
  made_ = y.storage().unsafeGetStorageImpl(), made_version_ = y._version();
}

void FrozenConv2dBackward::keep_result(const Tensor& y) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // Torch's ReLU6 reads what it was given. Hooks have seen what is kept: checkpoints count that.
  KeptTensor& bits = kept_[FrozenGradients::kBits];
  const auto raw = bits.variable.get_raw_data();
  if (activation_ != FrozenConv2d::Activation::relu || owns_kernels()) return;
  if (!formula_.has_bits || !raw || !raw->defined()) return;
  if (at::SavedTensorDefaultHooks::get_hooks() || !y.has_storage()) return;
  if (y.storage().unsafeGetStorageImpl() != made_ || y._version() != made_version_) return;
  kept_[FrozenGradients::kResult] = KeptTensor::of_result(y);
  bits = {}, formula_.has_bits = false, formula_.has_result = true;
}

void FrozenConv2dBackward::release_variables() {
  CompiledNode::release_variables();
  const std::lock_guard<std::mutex> lock(mutex_);
  masked_.reset();
}

variable_list FrozenConv2dBackward::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (at::GradMode::is_enabled() && grads[0].defined()) return apply_recording(grads);
  variable_list result(num_outputs());
  const Tensor passed = passed_on(grads);
  const bool wants_input = task_should_compute_output(kInput);
  if (!grads[0].defined()) {
    if (wants_input) result[kInput] = passed;
    return result;
  }
  const bool has_bits = formula_.has_bits;
  const bool wants_residual = num_outputs() > kResidual && task_should_compute_output(kResidual);
  const bool masks_in_dgrad = has_bits && formula_.has_norm && masks_in_dgrad_ && !is_batched(grads[0]);
  if (masks_in_dgrad && wants_input && !wants_residual) {
    // Nothing else reads the masked dy.
    const Tensor dy = grads[0].contiguous(format_of(bits_are_channels_last_));
    result[kInput] = input_gradient(dy, kept(FrozenGradients::kBits), passed);
    return result;
  }
  // Of the strides of bits it may be written to, and keeps them.
  const bool turned = wants_residual && has_bits && grads[0].sym_strides() != SymIntArrayRef(formula_.bits_stride);
  const Tensor given = turned ? grads[0] : Tensor();
  const Tensor dy = masked(std::move(grads[0]));
  const auto of_residual = [&] {
    const Tensor own = dy.is_same(given) ? dy.detach() : dy;
    return has_bits ? operand_.finish(own, given.defined() ? given : dy, formula_.bits_stride) : dy;
  };
  if (wants_input && wants_residual && next_edge(kInput) == next_edge(kResidual)) {
    // Of layers the residual's would come first.
    const Tensor first = of_residual();
    result[kInput] = input_gradient(dy, {}, passed.defined() ? passed + first : first);
    return result;
  }
  if (wants_input) result[kInput] = input_gradient(dy, {}, passed);
  if (wants_residual) result[kResidual] = of_residual();
  return result;
}

// Of differentiable operators, under create_graph. What is saved is unpacked once: checkpoints refuse a second time.
variable_list FrozenConv2dBackward::apply_recording(const variable_list& grads) {
  variable_list result(num_outputs());
  const Wanted wants = wanted();
  const Tensor weight = kept(FrozenGradients::kWeight);
  const FixedNormTensors fixed = norm();
  Tensor dy = grads[0];
  if (formula_.has_result) {
    dy = at::threshold_backward(dy, kept(FrozenGradients::kResult), 0);
  } else if (formula_.has_bits) {
    // Stock's relu reads its result in the backward pass, relu6 its input.
    const bool reads_result = activation_ == FrozenConv2d::Activation::relu;
    const AnyNodePtr read =
        reads_result ? pointer_to<torch::autograd::Node>(*this) : before_activation(dy, weight, fixed);
    const Tensor bits = kept(FrozenGradients::kBits);
    dy = linked(gate(dy, bits, {formula_.bits_stride, GateRule(), formula_.geometry.backend}), {{read, 0}},
                /*zeros=*/true, /*lasting=*/true);
  }
  if (wants.size() > kResidual && wants[kResidual]) result[kResidual] = dy;
  if (wants[kInput]) {
    const Tensor laid_out = in_layout(dy, format_of(dx_is_channels_last_));
    const Tensor dx = formula_.input_gradient(laid_out, weight, fixed, passed_on(grads));
    result[kInput] = linked(dx, {next_edge(kInput)}, /*zeros=*/false, /*lasting=*/false);
  }
  return result;
}

// A node for what the activation read.
AnyNodePtr FrozenConv2dBackward::before_activation(const Tensor& dy, const Tensor& weight,
                                                   const FixedNormTensors& norm) const {
  const auto node = make_node<FrozenConv2dBackward>(FrozenConv2d("none", formula_.geometry), formula_.input_size,
                                                    dx_is_channels_last_, weight, norm);
  node->set_next_edges(torch::autograd::edge_list(next_edges()));
  node->add_input_metadata(dy);
  return node;
}

// dy where this one's activation let the value through.
Tensor FrozenConv2dBackward::masked(Tensor&& dy) {
  if (formula_.has_result) return at::threshold_backward(dy, kept(FrozenGradients::kResult), 0);
  if (!formula_.has_bits) return std::move(dy);
  const bool known = is_marked(dy);
  masked_.reset();
  if (known) return std::move(dy);
  const Tensor bits = kept(FrozenGradients::kBits);
  const Backend backend = formula_.geometry.backend;
  if (may_write(dy)) {
    gate_inplace(dy, bits, {}, backend);
    return std::move(dy);
  }
  return gate(dy, bits, {formula_.bits_stride, GateRule(), backend});
}

FixedNormTensors FrozenConv2dBackward::norm() {
  return formula_.norm([this](size_t i) { return kept(i); });
}

Tensor FrozenConv2dBackward::input_gradient(const Tensor& dy, const Tensor& grad_mask, const Tensor& passed) {
  // Autograd lays a sum out as what came first.
  const bool apart = passed.defined() &&
                     passed.sym_strides() != SymIntArrayRef(dense_stride(formula_.input_size, dx_is_channels_last_));
  FrozenConv2dBackward* maker = apart ? nullptr : maker_of_input();
  const Tensor bits = maker ? maker->lend() : Tensor();
  const Tensor weight = kept(FrozenGradients::kWeight);
  const Tensor dx = frozen_conv2d_dgrad(
      {dy, weight, formula_.input_size, apart ? Tensor() : passed, bits, grad_mask, norm(), dx_is_channels_last_},
      formula_.geometry);
  if (bits.defined()) maker->mark(dx);
  return apart ? passed + dx : dx;
}

// The node that made the input, if nothing else sees its gradient and its bits are in the order of this dgrad.
FrozenConv2dBackward* FrozenConv2dBackward::maker_of_input() const {
  const auto& edge = next_edge(kInput);
  auto* maker = dynamic_cast<FrozenConv2dBackward*>(edge.function.get());
  if (!maker || edge.input_nr != 0 || !maker->formula_.has_bits || masks_in_dgrad_) return nullptr;
  if (maker->bits_are_channels_last_ != (owns_kernels() || dx_is_channels_last_)) return nullptr;
  if (!maker->tensor_pre_hooks().empty() || !maker->pre_hooks().empty() || !maker->retains_grad_hooks().empty()) {
    return nullptr;
  }
  if (const auto* tasks = torch::autograd::get_current_graph_task_exec_info()) {
    const auto found = tasks->find(maker);
    if (found != tasks->end() && found->second.captures_) return nullptr;
  }
  return maker;
}

Tensor FrozenConv2dBackward::lend() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept(FrozenGradients::kBits);
}

void FrozenConv2dBackward::mark(const Tensor& grad) {
  const std::lock_guard<std::mutex> lock(mutex_);
  masked_.emplace(grad.getIntrusivePtr());
  masked_version_ = grad._version();
}

bool FrozenConv2dBackward::is_marked(const Tensor& grad) const {
  // While the weak pointer is held no other tensor can take the address.
  return masked_ && masked_->_unsafe_get_target() == grad.unsafeGetTensorImpl() && grad._version() == masked_version_;
}

bool FrozenConv2dBackward::may_write(const Tensor& dy) const {
  return dy.use_count() == 1 && !at::isTensorSubclassLike(dy) && dy.has_storage() && dy.storage().use_count() == 1 &&
         dy.sym_strides() == SymIntArrayRef(formula_.bits_stride) && dy.is_non_overlapping_and_dense();
}

void will_be_kept(const Tensor& tensor) {
  if (!at::GradMode::is_enabled() || !tensor.requires_grad() || at::isTensorSubclassLike(tensor)) return;
  const auto& edge = torch::autograd::impl::gradient_edge(tensor);
  auto* maker = dynamic_cast<FrozenConv2dBackward*>(edge.function.get());
  if (maker && edge.input_nr == 0) maker->keep_result(tensor);
}

}  // namespace freezekit
