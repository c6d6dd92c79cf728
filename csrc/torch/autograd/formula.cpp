#include "torch/autograd/formula.h"

namespace freezekit {

void FormulaNode::keep(const variable_list& tensors) {
  for (const Tensor& tensor : tensors) kept_.emplace_back(tensor, /*is_output=*/false);
}

void FormulaNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& variable : kept_) variable.reset_data();
}

// What the engine asks for now, which autograd.grad(loss, subset) narrows, not what the graph could give.
std::vector<bool> FormulaNode::wanted() const {
  std::vector<bool> result(num_outputs());
  for (size_t i = 0; i < num_outputs(); ++i) result[i] = task_should_compute_output(i);
  return result;
}

variable_list FormulaNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!grads[0].defined()) return variable_list(num_outputs());
  variable_list kept;
  for (const auto& variable : kept_) kept.push_back(variable.unpack());
  return formula_(grads[0], kept, settings_, wanted());
}

void FormulaNode::compiled_args(CompiledNodeArgs& args) const {
  args.collect(name());
  for (const auto& value : settings_.values) args.collect(value);
  for (const auto& size : settings_.sizes) args.collect(size);
  for (size_t i = 0; i < num_outputs(); ++i) args.collect(task_should_compute_output(i));
  args.collect(kept_, /*is_output=*/false);
}

variable_list FormulaNode::apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) {
  for (auto& size : settings_.sizes) saved.before(size);
  saved.before(kept_);
  PackedArgs arguments;
  const std::vector<int64_t> counts = {static_cast<int64_t>(settings_.values.size()),
                                       static_cast<int64_t>(settings_.sizes.size()),
                                       static_cast<int64_t>(kept_.size())};
  arguments.pack(counts);
  for (const auto& value : settings_.values) arguments.pack(value);
  for (const auto& size : settings_.sizes) arguments.pack(size);
  for (const auto& variable : kept_) arguments.pack(variable.unpack());
  arguments.pack(wanted());
  variable_list result = trace_call(*this, name(), of_values_, grads, std::move(arguments), saved);
  for (auto& size : settings_.sizes) saved.after(size);
  saved.after(kept_);
  return result;
}

variable_list apply_packed(Formula formula, const variable_list& grads, const std::vector<c10::IValue>& packed) {
  PackedArgs arguments(packed);
  const auto counts = arguments.unpack<std::vector<int64_t>>();
  Settings settings;
  for (int64_t i = 0; i < counts[0]; ++i) settings.values.push_back(arguments.unpack<c10::IValue>());
  for (int64_t i = 0; i < counts[1]; ++i) settings.sizes.push_back(arguments.unpack<std::vector<c10::SymInt>>());
  variable_list kept;
  for (int64_t i = 0; i < counts[2]; ++i) kept.push_back(arguments.unpack<Tensor>());
  const auto wanted = arguments.unpack<std::vector<bool>>();
  if (!grads[0].defined()) return variable_list(wanted.size());
  return formula(grads[0], kept, settings, wanted);
}

bool needs_aten(const Tensor& tensor) {
  return tensor.layout() != at::kStrided || tensor.is_nested() || !at::isFloatingType(tensor.scalar_type()) ||
         tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || torch::autograd::isFwGradDefined(tensor);
}

}  // namespace freezekit
