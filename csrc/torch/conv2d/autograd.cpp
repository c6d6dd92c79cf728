// Autograd for all three operators: one node, because each operator is a derivative of the same trilinear form.
//
// What a node keeps is what the other gradients read and nothing else: an operand is kept only if some *other* operand
// needs a gradient. So a frozen weight keeps no input, and a layer that only its bias learns in keeps nothing at all.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "torch/backends/aten.h"
#include "torch/common/checks.h"
#include "torch/autograd/compiled.h"
#include "torch/common/layout.h"
#include "torch/autograd/node.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

enum Role : size_t { kInput, kWeight, kOutput };

// The derivative of the trilinear form with respect to `missing`, on the other two operands.
struct Trilinear {
  Geometry geometry;
  SizeVector<c10::SymInt> input_size, weight_size;

  Tensor derivative(Role missing, const std::array<Tensor, 3>& operand) const {
    if (missing == kOutput) return conv2d(operand[kInput], operand[kWeight], std::nullopt, geometry);
    if (missing == kInput) return conv2d_dgrad(operand[kOutput], operand[kWeight], input_size, geometry);
    return conv2d_wgrad(operand[kOutput], operand[kInput], weight_size, geometry);
  }
};

constexpr size_t kBias = 2;  // the slot of a bias among the results of backward; 0 and 1 are the operands

// What the backward pass of `result = derivative(computes)` computes from; its operands have `roles`, in that order.
struct BackwardOf {
  Trilinear form;
  Role computes;
  std::array<Role, 2> roles;
  at::MemoryFormat layout;  // of the result, so of its gradient, whatever layout that arrives in

  // Freezekit's own kernels read NHWC: what is in another layout is laid out once, for all gradients.
  Tensor laid_out(const Tensor& grad) const {
    return in_layout(grad, is_own(form.geometry.backend) ? at::MemoryFormat::ChannelsLast : layout);
  }

  // The gradients that are wanted, of both operands and, where there is one, the bias; `kept(i)` is operand i.
  template <class Kept>
  variable_list gradients(const variable_list& grads, const std::vector<bool>& wanted, Kept kept) const {
    variable_list result(wanted.size());
    if (!grads[0].defined()) return result;
    const Backend backend = form.geometry.backend;
    const bool bias = wanted.size() > kBias && wanted[kBias];
    const Tensor grad = wanted[0] || wanted[1] ? laid_out(grads[0]) : grads[0];
    for (size_t i = 0; i < 2; ++i) {
      if (!wanted[i]) continue;
      std::array<Tensor, 3> operand;
      operand[computes] = grad;
      operand[roles[1 - i]] = kept(1 - i);
      result[i] = form.derivative(roles[i], operand);
      if (is_own(backend)) result[i] = in_layout(result[i], layout);
    }
    if (bias) result[kBias] = is_own(backend) ? conv2d_bias_grad(grad, backend) : grads[0].sum({0, 2, 3});
    return result;
  }

  const char* name() const {
    static const char* const names[] = {"FreezekitConv2dDgradBackward", "FreezekitConv2dWgradBackward",
                                        "FreezekitConv2dBackward"};
    return names[computes];
  }

  void pack(PackedArgs& arguments) const;
  static BackwardOf unpack(PackedArgs& arguments);
};

void BackwardOf::pack(PackedArgs& arguments) const {
  const Geometry& g = form.geometry;
  for (const auto* values : {&g.stride, &g.padding, &g.dilation}) {
    arguments.pack(std::vector<int64_t>(values->begin(), values->end()));
  }
  arguments.pack(g.groups);
  arguments.pack(std::string(to_string(g.backend)));
  for (const auto* size : {&form.input_size, &form.weight_size}) {
    arguments.pack(std::vector<c10::SymInt>(size->begin(), size->end()));
  }
  for (const Role role : {computes, roles[0], roles[1]}) arguments.pack(static_cast<int64_t>(role));
  arguments.pack(static_cast<int64_t>(layout));
}

BackwardOf BackwardOf::unpack(PackedArgs& arguments) {
  const auto stride = arguments.unpack<std::vector<int64_t>>();
  const auto padding = arguments.unpack<std::vector<int64_t>>();
  const auto dilation = arguments.unpack<std::vector<int64_t>>();
  const auto groups = arguments.unpack<int64_t>();
  const auto backend = arguments.unpack<std::string>();
  const auto input_size = arguments.unpack<std::vector<c10::SymInt>>();
  const auto weight_size = arguments.unpack<std::vector<c10::SymInt>>();
  const auto role = [&] { return static_cast<Role>(arguments.unpack<int64_t>()); };
  const Role computes = role(), first = role(), second = role();
  return {{Geometry(stride, padding, dilation, groups, backend),
           {input_size.begin(), input_size.end()},
           {weight_size.begin(), weight_size.end()}},
          computes,
          {first, second},
          static_cast<at::MemoryFormat>(arguments.unpack<int64_t>())};
}

// Conv2dBackward::apply as a function of values alone.
variable_list backward_of_values(const variable_list& grads, const std::vector<c10::IValue>& values) {
  PackedArgs arguments(values);
  const BackwardOf backward = BackwardOf::unpack(arguments);
  const std::array<Tensor, 2> kept = {arguments.unpack<Tensor>(), arguments.unpack<Tensor>()};
  const auto wanted = arguments.unpack<std::vector<bool>>();
  return backward.gradients(grads, wanted, [&](size_t i) { return kept[i]; });
}

class Conv2dBackward : public torch::autograd::Node {
 public:
  explicit Conv2dBackward(BackwardOf backward) : backward_(std::move(backward)) {}

  void keep(size_t index, const Tensor& operand) { kept_[index] = SavedVariable(operand, /*is_output=*/false); }

  std::string name() const override { return backward_.name(); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : kept_) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return backward_.gradients(grads, wanted(), [&](size_t i) { return kept_[i].unpack(); });
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    const Geometry& g = backward_.form.geometry;
    args.collect(name());
    for (const auto& values : {g.stride, g.padding, g.dilation}) {
      for (const int64_t value : values) args.collect(value);
    }
    args.collect(g.groups);
    args.collect(static_cast<int64_t>(g.backend));
    for (const Role role : backward_.roles) args.collect(static_cast<int64_t>(role));
    args.collect(static_cast<int64_t>(backward_.layout));
    for (const bool want : wanted()) args.collect(want);
    args.collect(SymIntArrayRef(backward_.form.input_size));
    args.collect(SymIntArrayRef(backward_.form.weight_size));
    for (const auto& variable : kept_) args.collect(variable, /*is_output=*/false);
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    saved.before(backward_.form.input_size);
    saved.before(backward_.form.weight_size);
    for (auto& variable : kept_) saved.before(variable);
    PackedArgs arguments;
    backward_.pack(arguments);
    for (const auto& variable : kept_) arguments.pack(variable.unpack());
    arguments.pack(wanted());
    variable_list result = trace_call(*this, name(), backward_of_values, grads, std::move(arguments), saved);
    saved.after(backward_.form.input_size);
    saved.after(backward_.form.weight_size);
    for (auto& variable : kept_) saved.after(variable);
    return result;
  }

 private:
  // What the engine asks for now, which autograd.grad(loss, subset) narrows, not what the graph could give.
  std::vector<bool> wanted() const {
    std::vector<bool> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  BackwardOf backward_;
  std::array<SavedVariable, 2> kept_;
};

bool is_transformed(const Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || torch::autograd::isFwGradDefined(tensor);
}

constexpr const char* kFormulaOnly = "tensors of torch.func transforms, of forward-mode AD or complex ones";

// torch.func transforms and forward-mode AD want formulas that a C++ node cannot give; ATen has them, and complex ones.
template <class... Tensors>
bool needs_aten_formula(const Tensors&... tensors) {
  return ((tensors.is_complex() || is_transformed(tensors)) || ...);
}

SizeVector<c10::SymInt> owned_sizes(const Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  return {sizes.begin(), sizes.end()};
}

template <class Compute, class... Bias>
Tensor record(Trilinear form, Role computes, Role first_role, const Tensor& first, Role second_role,
              const Tensor& second, Compute compute, const Bias&... bias) {
  NodePtr<Conv2dBackward> node;
  if (torch::autograd::compute_requires_grad(first, second, bias...)) {
    node = make_node<Conv2dBackward>(BackwardOf{
        std::move(form), computes, {first_role, second_role}, layout_of(first, second)});
    node->set_next_edges(torch::autograd::collect_next_edges(first, second, bias...));
    if (second.requires_grad()) node->keep(0, first);
    if (first.requires_grad()) node->keep(1, second);
  }
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }();
  if (node) torch::autograd::set_history(result, node);
  return result;
}

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                       std::string_view backend) {
  const Geometry geometry(stride, padding, dilation, groups, backend);
  check_operand(input, "input");
  check_operand(weight, "weight");
  const Tensor bias_or_none = bias.value_or(Tensor());
  if (needs_aten_formula(input, weight) || (bias_or_none.defined() && is_transformed(bias_or_none))) {
    check_conv2d<c10::SymInt>(input, weight, bias, geometry);
    check_formula_backend(geometry.backend, kFormulaOnly);
    return aten::conv2d(input, weight, bias, geometry);
  }
  const auto compute = [&] { return conv2d(input, weight, bias, geometry); };
  Trilinear form{geometry, owned_sizes(input), owned_sizes(weight)};
  if (!bias_or_none.defined()) {
    return record(std::move(form), kOutput, kInput, input, kWeight, weight, compute);
  }
  return record(std::move(form), kOutput, kInput, input, kWeight, weight, compute, bias_or_none);
}

Tensor dgrad_autograd(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry geometry(stride, padding, dilation, groups, backend);
  check_operand(grad_output, "grad_output");
  check_operand(weight, "weight");
  if (needs_aten_formula(grad_output, weight)) {
    check_dgrad<c10::SymInt>(grad_output, weight, input_size, geometry);
    check_formula_backend(geometry.backend, kFormulaOnly);
    return aten::dgrad(grad_output, weight, input_size, geometry);
  }
  Trilinear form{geometry, {input_size.begin(), input_size.end()}, owned_sizes(weight)};
  return record(std::move(form), kInput, kOutput, grad_output, kWeight, weight,
                [&] { return conv2d_dgrad(grad_output, weight, input_size, geometry); });
}

Tensor wgrad_autograd(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry geometry(stride, padding, dilation, groups, backend);
  check_operand(grad_output, "grad_output");
  check_operand(input, "input");
  if (needs_aten_formula(grad_output, input)) {
    check_wgrad<c10::SymInt>(grad_output, input, weight_size, geometry);
    check_formula_backend(geometry.backend, kFormulaOnly);
    return aten::wgrad(grad_output, input, weight_size, geometry);
  }
  Trilinear form{geometry, owned_sizes(input), {weight_size.begin(), weight_size.end()}};
  return record(std::move(form), kWeight, kOutput, grad_output, kInput, input,
                [&] { return conv2d_wgrad(grad_output, input, weight_size, geometry); });
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("conv2d", freezekit::conv2d_autograd);
  m.impl("conv2d_dgrad", freezekit::dgrad_autograd);
  m.impl("conv2d_wgrad", freezekit::wgrad_autograd);
}
