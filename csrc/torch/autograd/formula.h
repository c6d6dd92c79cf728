// A backward node for layers whose gradient is one formula of the output's gradient, a few tensors and some settings.
//
// What the node keeps is the list it is given and nothing else; the formula is made of differentiable operators, so
// double backward needs no more than running it with gradients recorded.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <string>
#include <vector>

#include "torch/autograd/compiled.h"
#include "torch/autograd/node.h"

namespace freezekit {

using at::Tensor;
using torch::autograd::variable_list;

// Numbers, strings and lists in `values`, sizes and strides (which may be symbolic under tracing) in `sizes`.
struct Settings {
  std::vector<c10::IValue> values;
  std::vector<std::vector<c10::SymInt>> sizes;
};

inline std::vector<c10::SymInt> owned(c10::SymIntArrayRef sizes) { return {sizes.begin(), sizes.end()}; }

// Gradients of the node's inputs; those that are not `wanted` stay undefined and cost nothing.
using Formula = variable_list (*)(const Tensor& grad, const variable_list& kept, const Settings&,
                                  const std::vector<bool>& wanted);

class FormulaNode : public torch::autograd::Node {
 public:
  FormulaNode(const char* name, Formula formula, FunctionalApply of_values, Settings settings)
      : name_(name), formula_(formula), of_values_(of_values), settings_(std::move(settings)) {}

  void keep(const variable_list& tensors);

  std::string name() const override { return name_; }
  void release_variables() override;
  variable_list apply(variable_list&& grads) override;
  void compiled_args(CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override;

 private:
  std::vector<bool> wanted() const;

  const char* name_;
  Formula formula_;
  FunctionalApply of_values_;
  Settings settings_;
  std::vector<torch::autograd::SavedVariable> kept_;
};

// The formula as a function of values alone, for compiled autograd.
variable_list apply_packed(Formula formula, const variable_list& grads, const std::vector<c10::IValue>& packed);

template <Formula kFormula>
variable_list formula_of_values(const variable_list& grads, const std::vector<c10::IValue>& packed) {
  return apply_packed(kFormula, grads, packed);
}

// A node whose results are the gradients of `inputs`, in that order; none where no gradient is recorded.
template <Formula kFormula, class... Inputs>
NodePtr<FormulaNode> formula_node(const char* name, Settings settings, const Inputs&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) return {};
  auto node = make_node<FormulaNode>(name, kFormula, formula_of_values<kFormula>, std::move(settings));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// torch.func transforms and forward-mode AD want formulas that a C++ node cannot give, and ATen has. So do tensors that
// no kernel here takes: sparse, nested, quantized, complex and integer ones.
bool needs_aten(const Tensor&);

}  // namespace freezekit
