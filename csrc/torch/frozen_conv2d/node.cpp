#include "torch/frozen_conv2d/node.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/graph_task.h>

#include "torch/autograd/formula.h"
#include "torch/autograd/linked.h"
#include "torch/common/layout.h"

namespace freezekit {
namespace {

using torch::autograd::variable_list;

constexpr size_t kInput = 0, kResidual = 1;  // edges
constexpr size_t kPassedOn = 1;              // the gradient of the input that was passed on

Tensor passed_on(const variable_list& grads) { return grads.size() > kPassedOn ? grads[kPassedOn] : Tensor(); }

// dx of differentiable operators; masks are applied where they were made.
Tensor plain_input_gradient(const Tensor& dy, const Tensor& weight, const FixedNormTensors& norm,
                            SymIntArrayRef input_size, const Tensor& passed, const Geometry& g) {
  const Tensor dx = conv2d_dgrad(scaled_by_norm(dy, norm), weight, input_size, g);
  return passed.defined() ? dx + passed : dx;
}

// FrozenConv2dBackward::apply as a function of values alone, which knows no neighbours.
variable_list backward_of_values(const variable_list& grads, const std::vector<c10::IValue>& values) {
  PackedArgs arguments(values);
  const auto stride = arguments.unpack<std::vector<c10::SymInt>>();
  const auto padding = arguments.unpack<std::vector<c10::SymInt>>();
  const auto dilation = arguments.unpack<std::vector<c10::SymInt>>();
  const auto groups = arguments.unpack<c10::SymInt>();
  const auto backend = arguments.unpack<std::string>();
  const auto input_size = arguments.unpack<std::vector<c10::SymInt>>();
  const auto bits_stride = arguments.unpack<std::vector<c10::SymInt>>();
  const auto weight = arguments.unpack<Tensor>();
  FixedNormTensors norm;
  norm.gamma = arguments.unpack<Tensor>(), norm.var = arguments.unpack<Tensor>();
  norm.eps = arguments.unpack<double>();
  const auto bits = arguments.unpack<Tensor>(), kept = arguments.unpack<Tensor>();
  const auto wanted = arguments.unpack<std::vector<bool>>();
  variable_list result(wanted.size());
  if (!grads[0].defined()) {
    if (wanted[kInput]) result[kInput] = passed_on(grads);
    return result;
  }
  Tensor dy = grads[0];
  if (kept.defined()) {
    dy = at::threshold_backward(dy, kept, 0);
  } else if (bits.defined()) {
    dy = gate(dy, bits, {bits_stride, GateRule(), parse_backend(backend)});
  }
  if (wanted.size() > kResidual && wanted[kResidual]) result[kResidual] = dy;
  if (wanted[kInput]) {
    const Geometry g(stride, padding, dilation, groups, backend);
    result[kInput] = plain_input_gradient(dy, weight, norm, input_size, passed_on(grads), g);
  }
  return result;
}

}  // namespace

// On a CPU a mask is a pass of its own wherever it is applied, and the one that scales dy can do it too.
FrozenConv2dBackward::FrozenConv2dBackward(FrozenConv2d f, SymIntArrayRef input_size, bool dx_is_channels_last,
                                           const Tensor& weight, const FixedNormTensors& norm)
    : f_(std::move(f)), input_size_(owned(input_size)), dx_is_channels_last_(dx_is_channels_last), eps_(norm.eps),
      has_norm_(norm.defined()), masks_in_dgrad_(weight.is_cpu() && !f_.own_kernels()),
      weight_(weight, /*is_output=*/false), gamma_(norm.gamma, /*is_output=*/false),
      var_(norm.var, /*is_output=*/false) {}

void FrozenConv2dBackward::keep(const Tensor& y, const Tensor& bits) {
  if (!f_.has_mask()) return;
  operand_.is_first = f_.activation == FrozenConv2d::Activation::relu;
  operand_.stride.assign(y.sym_strides().begin(), y.sym_strides().end());
  bits_are_channels_last_ = f_.own_kernels() || y.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  bits_stride_ = dense_stride(y.sym_sizes(), bits_are_channels_last_);
  bits_ = KeptTensor(bits);
  has_bits_ = true;
  if (!y.has_storage()) return;
  made_ = y.storage().unsafeGetStorageImpl(), made_version_ = y._version();
}

void FrozenConv2dBackward::keep_result(const Tensor& y) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // Torch's ReLU6 reads what it was given. Hooks have seen what is kept: checkpoints count that.
  const auto raw = bits_.variable.get_raw_data();
  if (f_.activation != FrozenConv2d::Activation::relu || f_.own_kernels()) return;
  if (!has_bits_ || !raw || !raw->defined()) return;
  if (at::SavedTensorDefaultHooks::get_hooks() || !y.has_storage()) return;
  if (y.storage().unsafeGetStorageImpl() != made_ || y._version() != made_version_) return;
  result_ = torch::autograd::SavedVariable(y, /*is_output=*/true);
  bits_ = {}, has_bits_ = false, has_result_ = true;
}

void FrozenConv2dBackward::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  weight_.reset_data();
  gamma_.reset_data();
  var_.reset_data();
  result_.reset_data();
  bits_.variable.reset_data();
  masked_.reset();
}

std::vector<bool> FrozenConv2dBackward::wanted() const {
  std::vector<bool> result(num_outputs());
  for (size_t i = 0; i < result.size(); ++i) result[i] = task_should_compute_output(i);
  return result;
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
  const bool wants_residual = num_outputs() > kResidual && task_should_compute_output(kResidual);
  if (has_bits_ && has_norm_ && masks_in_dgrad_ && wants_input && !wants_residual) {
    // Nothing else reads the masked dy.
    const Tensor dy = grads[0].contiguous(format_of(bits_are_channels_last_));
    result[kInput] = input_gradient(dy, bits_.unpack(), passed);
    return result;
  }
  // Of the strides of bits it may be written to, and keeps them.
  const bool turned = wants_residual && has_bits_ && grads[0].sym_strides() != SymIntArrayRef(bits_stride_);
  const Tensor given = turned ? grads[0] : Tensor();
  const Tensor dy = masked(std::move(grads[0]));
  if (wants_input) result[kInput] = input_gradient(dy, {}, passed);
  if (wants_residual) {
    const Tensor own = dy.is_same(given) ? dy.detach() : dy;
    result[kResidual] = has_bits_ ? operand_.finish(own, given.defined() ? given : dy, bits_stride_) : dy;
  }
  return result;
}

// Of differentiable operators, under create_graph. What is saved is unpacked once: checkpoints refuse a second time.
variable_list FrozenConv2dBackward::apply_recording(const variable_list& grads) {
  variable_list result(num_outputs());
  const std::vector<bool> wants = wanted();
  const Tensor weight = weight_.unpack();
  const FixedNormTensors fixed = norm();
  Tensor dy = grads[0];
  if (has_result_) {
    dy = at::threshold_backward(dy, result_.unpack(pointer_to<torch::autograd::Node>(*this)), 0);
  } else if (has_bits_) {
    // Stock's relu reads its result in the backward pass, relu6 its input.
    const bool reads_result = f_.activation == FrozenConv2d::Activation::relu;
    const AnyNodePtr read =
        reads_result ? pointer_to<torch::autograd::Node>(*this) : before_activation(dy, weight, fixed);
    dy = linked(gate(dy, bits_.unpack(), {bits_stride_, GateRule(), f_.geometry.backend}), {{read, 0}}, /*zeros=*/true,
                /*lasting=*/true);
  }
  if (wants.size() > kResidual && wants[kResidual]) result[kResidual] = dy;
  if (wants[kInput]) {
    const Tensor laid_out = in_layout(dy, format_of(dx_is_channels_last_));
    const Tensor dx = plain_input_gradient(laid_out, weight, fixed, input_size_, passed_on(grads), f_.geometry);
    result[kInput] = linked(dx, {next_edge(kInput)}, /*zeros=*/false, /*lasting=*/false);
  }
  return result;
}

// A node for what the activation read.
AnyNodePtr FrozenConv2dBackward::before_activation(const Tensor& dy, const Tensor& weight,
                                                   const FixedNormTensors& norm) const {
  FrozenConv2d f = f_;
  f.activation = FrozenConv2d::Activation::none;
  const auto node = make_node<FrozenConv2dBackward>(std::move(f), input_size_, dx_is_channels_last_, weight, norm);
  node->set_next_edges(torch::autograd::edge_list(next_edges()));
  node->add_input_metadata(dy);
  return node;
}

// dy where this one's activation let the value through.
Tensor FrozenConv2dBackward::masked(Tensor&& dy) {
  if (has_result_) return at::threshold_backward(dy, result_.unpack(pointer_to<torch::autograd::Node>(*this)), 0);
  if (!has_bits_) return std::move(dy);
  const bool known = is_marked(dy);
  masked_.reset();
  if (known) return std::move(dy);
  const Tensor bits = bits_.unpack();
  if (may_write(dy)) {
    gate_inplace(dy, bits, {}, f_.geometry.backend);
    return std::move(dy);
  }
  return gate(dy, bits, {bits_stride_, GateRule(), f_.geometry.backend});
}

FixedNormTensors FrozenConv2dBackward::norm() const {
  if (!has_norm_) return {};
  return {gamma_.unpack(), Tensor(), Tensor(), var_.unpack(), eps_};
}

Tensor FrozenConv2dBackward::input_gradient(const Tensor& dy, const Tensor& grad_mask, const Tensor& passed) {
  FrozenConv2dBackward* maker = maker_of_input();
  const Tensor bits = maker ? maker->lend() : Tensor();
  const Tensor dx = frozen_conv2d_dgrad(
      {dy, weight_.unpack(), input_size_, passed, bits, grad_mask, norm(), dx_is_channels_last_}, f_.geometry);
  if (bits.defined()) maker->mark(dx);
  return dx;
}

// The node that made the input, if nothing else sees its gradient and its bits are in the order of this dgrad.
FrozenConv2dBackward* FrozenConv2dBackward::maker_of_input() const {
  const auto& edge = next_edge(kInput);
  auto* maker = dynamic_cast<FrozenConv2dBackward*>(edge.function.get());
  if (!maker || edge.input_nr != 0 || !maker->has_bits_ || masks_in_dgrad_) return nullptr;
  if (maker->bits_are_channels_last_ != (f_.own_kernels() || dx_is_channels_last_)) return nullptr;
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
  return bits_.unpack();
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
         dy.sym_strides() == SymIntArrayRef(bits_stride_) && dy.is_non_overlapping_and_dense();
}

void FrozenConv2dBackward::compiled_args(CompiledNodeArgs& args) const {
  const Geometry& g = f_.geometry;
  args.collect(name());
  for (const auto& values : {g.stride, g.padding, g.dilation}) {
    for (const c10::SymInt& value : values) args.collect(value.expect_int());
  }
  args.collect(g.groups.expect_int());
  args.collect(static_cast<int64_t>(g.backend));
  args.collect(has_bits_);
  args.collect(has_result_);
  for (const bool want : wanted()) args.collect(want);
  args.collect(SymIntArrayRef(input_size_));
  args.collect(SymIntArrayRef(bits_stride_));
  args.collect(eps_);
  args.collect(weight_, /*is_output=*/false);
  args.collect(gamma_, /*is_output=*/false);
  args.collect(var_, /*is_output=*/false);
  args.collect(bits_.variable, /*is_output=*/false);
  args.collect(result_, /*is_output=*/true);
}

variable_list FrozenConv2dBackward::apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) {
  saved.before(input_size_);
  saved.before(bits_stride_);
  saved.before(weight_);
  saved.before(gamma_);
  saved.before(var_);
  saved.before(bits_.variable);
  saved.before(result_);
  const Geometry& g = f_.geometry;
  PackedArgs arguments;
  for (const auto* values : {&g.stride, &g.padding, &g.dilation}) {
    arguments.pack(std::vector<c10::SymInt>(values->begin(), values->end()));
  }
  arguments.pack(g.groups);
  arguments.pack(std::string(to_string(g.backend)));
  arguments.pack(input_size_);
  arguments.pack(bits_stride_);
  arguments.pack(weight_.unpack());
  arguments.pack(gamma_.unpack());
  arguments.pack(var_.unpack());
  arguments.pack(eps_);
  arguments.pack(has_bits_ ? bits_.unpack() : Tensor());
  arguments.pack(has_result_ ? result_.unpack(pointer_to<torch::autograd::Node>(*this)) : Tensor());
  arguments.pack(wanted());
  variable_list result = trace_call(*this, name(), backward_of_values, grads, std::move(arguments), saved);
  saved.after(input_size_);
  saved.after(bits_stride_);
  saved.after(weight_);
  saved.after(gamma_);
  saved.after(var_);
  saved.after(bits_.variable);
  saved.after(result_);
  return result;
}

void will_be_kept(const Tensor& tensor) {
  if (!at::GradMode::is_enabled() || !tensor.requires_grad() || at::isTensorSubclassLike(tensor)) return;
  const auto& edge = torch::autograd::impl::gradient_edge(tensor);
  auto* maker = dynamic_cast<FrozenConv2dBackward*>(edge.function.get());
  if (maker && edge.input_nr == 0) maker->keep_result(tensor);
}

}  // namespace freezekit
