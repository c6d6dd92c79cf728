// Torch's own nodes, which keep their operands in members that everybody can see.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/silu.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/torch_dispatch_mode.h>

#include <array>

#include "torch/autograd/node.h"
#include "torch/chains/recipes.h"

namespace freezekit::chain {
namespace {

namespace generated = torch::autograd::generated;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::SavedVariableHooks;

// What is known of the last nodes, by address. It may be about another node that had the address before: whatever follows
// from it is tried.
struct Note {
  const Node* node = nullptr;
  Tensor weight, bias;  // copies
  std::weak_ptr<const Recipe> recipe;
};

thread_local std::array<Note, 16> notes;
thread_local size_t next_note = 0;

Note& new_note(const Node* node) {
  Note& note = notes[next_note++ % notes.size()];
  note = Note{};
  note.node = node;
  return note;
}

const Note* note_of(const Node* node) {
  for (size_t age = 1; age <= notes.size(); ++age) {
    const Note& note = notes[(next_note - age) % notes.size()];
    if (note.node == node) return &note;
  }
  return nullptr;
}

template <class T>
T* node_of(const Tensor& result) {
  Node* node = result.grad_fn().get();
  return node && typeid(*node) == typeid(T) ? static_cast<T*>(node) : nullptr;
}

RecipePtr of_group_norm(const generated::NativeGroupNormBackward0& node, bool watched, bool has_data) {
  if (node.input_.has_hooks() && !watched) return nullptr;
  const Note* note = note_of(&node);
  if (!note) return nullptr;
  const AnyNodePtr self = pointer_to(const_cast<generated::NativeGroupNormBackward0&>(node));
  return group_norm(node.input_.unpack(), node.result1_.unpack(self), node.result2_.unpack(self), note->weight,
                    note->bias, has_data);
}

template <class T>
RecipePtr of_activation(const T& node, bool watched, bool has_data, Function f) {
  const Note* note = node.self_.has_hooks() ? note_of(&node) : nullptr;
  if (RecipePtr inner = note ? note->recipe.lock() : nullptr) return function_of(std::move(inner), std::move(f));
  if (node.self_.has_hooks() && !watched) return nullptr;
  return function_of(node.self_.unpack(), std::move(f), has_data);
}

RecipePtr candidate_for(const Tensor& value, Maker maker, bool watched, bool has_data) {
  if (maker == Maker::norm) {
    const auto* node = node_of<generated::NativeGroupNormBackward0>(value);
    return node ? of_group_norm(*node, watched, has_data) : nullptr;
  }
  if (const auto* node = node_of<generated::SiluBackward0>(value)) {
    return of_activation(*node, watched, has_data, [](const Tensor& x) { return at::silu(x); });
  }
  if (const auto* node = node_of<generated::HardswishBackward0>(value)) {
    return of_activation(*node, watched, has_data, [](const Tensor& x) { return at::hardswish(x); });
  }
  if (const auto* node = node_of<generated::MishBackward0>(value)) {
    return of_activation(*node, watched, has_data, [](const Tensor& x) { return at::mish(x); });
  }
  if (const auto* node = node_of<generated::GeluBackward0>(value)) {
    return of_activation(*node, watched, has_data,
                         [how = node->approximate](const Tensor& x) { return at::gelu(x, how); });
  }
  return nullptr;
}

class ComputedAgain : public SavedVariableHooks {
 public:
  explicit ComputedAgain(RecipePtr recipe) : recipe_(std::move(recipe)) {}
  void call_pack_hook(const Tensor&) override {}
  // What was saved is no work of the backward pass: modes of dispatch do not see it, as they do not see a tensor saved.
  Tensor call_unpack_hook() override {
    const torch::torch_dispatch_mode::StashTorchDispatchStackGuard no_modes;
    return recipe_->compute();
  }

  // Compiled autograd traces a function of Python and what it is given: the value itself, which each backward pass asks
  // for anew.
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data() const override {
    const pybind11::gil_scoped_acquire gil;
    const auto held = [](PyObject* object) { return c10::SafePyObject(object, getPyInterpreter()); };
    pybind11::object given = pybind11::module_::import("freezekit.enabling").attr("as_given");
    return std::pair(held(given.release().ptr()),
                     held(THPVariable_Wrap(const_cast<ComputedAgain*>(this)->call_unpack_hook())));
  }

 private:
  RecipePtr recipe_;
};

template <class T>
SavedVariable* saved_self(const Tensor& result) {
  T* node = node_of<T>(result);
  return node ? &node->self_ : nullptr;
}

SavedVariable* saved(const Tensor& result, Operand operand) {
  if (auto* node = node_of<generated::MulBackward0>(result)) {
    return operand == Operand::self ? &node->self_ : &node->other_;
  }
  for (auto find : {saved_self<generated::SiluBackward0>, saved_self<generated::GeluBackward0>,
                    saved_self<generated::HardswishBackward0>, saved_self<generated::MishBackward0>}) {
    if (SavedVariable* found = find(result)) return found;
  }
  return nullptr;
}

}  // namespace

RecipePtr recipe_for(const Tensor& value, Maker maker, bool watched) {
  if (!watched && at::SavedTensorDefaultHooks::get_hooks()) return nullptr;
  const bool has_data = !value.is_meta() && !value.key_set().has(c10::DispatchKey::Python);
  const uint32_t written = maker == Maker::activation ? 1 : 0;  // by the maker, in place
  if (value.is_view() || value.output_nr() != 0 || (!has_data && value._version() > written)) return nullptr;
  try {
    const RecipePtr recipe = candidate_for(value, maker, watched, has_data);
    return recipe && (!has_data || recipe->gives(value)) ? recipe : nullptr;
  } catch (const c10::Error&) {
    return nullptr;  // what the maker saved is gone, or was written to: backward says so, if there is one
  }
}

Unseen::Unseen() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}

Unseen::~Unseen() { at::SavedTensorDefaultHooks::set_tracing(before_); }

void keep(const Tensor& result, Operand which, const Tensor& operand, const RecipePtr& recipe) {
  SavedVariable* const variable = saved(result, which);
  if (!variable || variable->has_hooks()) return;
  if (recipe) {
    variable->register_hooks(std::make_unique<ComputedAgain>(recipe));
    new_note(result.grad_fn().get()).recipe = recipe;
  } else if (at::SavedTensorDefaultHooks::get_hooks()) {
    *variable = SavedVariable(operand, /*is_output=*/false);
  }
}

void note_parameters(const Tensor& result, const Tensor& weight, const Tensor& bias) {
  const auto* node = node_of<generated::NativeGroupNormBackward0>(result);
  if (!node) return;
  const at::AutoDispatchBelowADInplaceOrView below;
  Note& note = new_note(node);  // in any case: an older one of this address says nothing about this node
  if (!can_be_made_again(result, weight, bias)) return;
  if (weight.defined()) note.weight = weight.clone();
  if (bias.defined()) note.bias = bias.clone();
}

}  // namespace freezekit::chain
