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

#include "torch/aten.h"
#include "torch/checks.h"
#include "torch/node.h"
#include "torch/operators.h"

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

// The gradients of `result = derivative(computes)`, whose operands are `first`, `second` and, of conv2d only, a bias.
class Conv2dBackward : public torch::autograd::Node {
 public:
  Conv2dBackward(Trilinear form, Role computes, Role first, Role second)
      : form_(std::move(form)), computes_(computes), roles_{first, second} {}

  void keep(size_t index, const Tensor& operand) { kept_[index] = SavedVariable(operand, /*is_output=*/false); }

  std::string name() const override {
    static const char* const names[] = {"FreezekitConv2dDgradBackward", "FreezekitConv2dWgradBackward",
                                        "FreezekitConv2dBackward"};
    return names[computes_];
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : kept_) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(num_outputs());
    if (!grads[0].defined()) return result;
    for (size_t i = 0; i < 2; ++i) {
      // What the engine asks for now, which autograd.grad(loss, subset) narrows, not what the graph could give.
      if (!task_should_compute_output(i)) continue;
      std::array<Tensor, 3> operand;
      operand[computes_] = grads[0];
      operand[roles_[1 - i]] = kept_[1 - i].unpack();
      result[i] = form_.derivative(roles_[i], operand);
    }
    if (num_outputs() == 3 && task_should_compute_output(2)) result[2] = grads[0].sum({0, 2, 3});
    return result;
  }

 private:
  Trilinear form_;
  Role computes_;
  std::array<Role, 2> roles_;
  std::array<SavedVariable, 2> kept_;
};

bool is_transformed(const Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || torch::autograd::isFwGradDefined(tensor);
}

// torch.func transforms and forward-mode AD want formulas that a C++ node cannot give; ATen has them, and complex ones.
template <class... Tensors>
bool needs_aten_formula(const Tensors&... tensors) {
  return ((tensors.is_complex() || is_transformed(tensors)) || ...);
}

SizeVector<c10::SymInt> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  return {sizes.begin(), sizes.end()};
}

template <class Compute, class... Bias>
Tensor record(Trilinear form, Role computes, Role first_role, const Tensor& first, Role second_role,
              const Tensor& second, Compute compute, const Bias&... bias) {
  NodePtr<Conv2dBackward> node;
  if (torch::autograd::compute_requires_grad(first, second, bias...)) {
    node = make_node<Conv2dBackward>(std::move(form), computes, first_role, second_role);
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
  const Tensor bias_or_none = bias.value_or(Tensor());
  if (needs_aten_formula(input, weight) || (bias_or_none.defined() && is_transformed(bias_or_none))) {
    return aten::conv2d(input, weight, bias, geometry);
  }
  const auto compute = [&] { return conv2d(input, weight, bias, geometry); };
  Trilinear form{geometry, sizes_of(input), sizes_of(weight)};
  if (!bias_or_none.defined()) {
    return record(std::move(form), kOutput, kInput, input, kWeight, weight, compute);
  }
  return record(std::move(form), kOutput, kInput, input, kWeight, weight, compute, bias_or_none);
}

Tensor dgrad_autograd(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry geometry(stride, padding, dilation, groups, backend);
  if (needs_aten_formula(grad_output, weight)) return aten::dgrad(grad_output, weight, input_size, geometry);
  Trilinear form{geometry, {input_size.begin(), input_size.end()}, sizes_of(weight)};
  return record(std::move(form), kInput, kOutput, grad_output, kWeight, weight,
                [&] { return conv2d_dgrad(grad_output, weight, input_size, geometry); });
}

Tensor wgrad_autograd(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend) {
  const Geometry geometry(stride, padding, dilation, groups, backend);
  if (needs_aten_formula(grad_output, input)) return aten::wgrad(grad_output, input, weight_size, geometry);
  Trilinear form{geometry, sizes_of(input), {weight_size.begin(), weight_size.end()}};
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
