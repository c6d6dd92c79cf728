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

#include <array>

#include "torch/autograd/node.h"
#include "torch/chains/recipes.h"

namespace freezekit::chain {
namespace {

namespace generated = torch::autograd::generated;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::SavedVariableHooks;

// What is known of the last nodes, by address. It may be about another node that had the address before, or a bias that
// has moved since: whatever follows from it is tried.
struct Note {
  const Node* node = nullptr;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> bias{
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  std::weak_ptr<const Recipe> recipe;
};

thread_local std::array<Note, 64> notes;
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

RecipePtr of_group_norm(const generated::NativeGroupNormBackward0& node, bool watched) {
  if (node.input_.has_hooks() && !watched) return nullptr;
  const Note* note = note_of(&node);
  if (!note) return nullptr;
  const Tensor bias(note->bias.lock());
  const AnyNodePtr self = pointer_to(const_cast<generated::NativeGroupNormBackward0&>(node));
  return group_norm(node.input_.unpack(), node.result1_.unpack(self), node.result2_.unpack(self), node.weight_.unpack(),
                    bias);
}

template <class T>
RecipePtr of_activation(const T& node, bool watched, Function f) {
  const Note* note = node.self_.has_hooks() ? note_of(&node) : nullptr;
  if (RecipePtr inner = note ? note->recipe.lock() : nullptr) return function_of(std::move(inner), std::move(f));
  if (node.self_.has_hooks() && !watched) return nullptr;
  return function_of(node.self_.unpack(), std::move(f));
}

RecipePtr candidate_for(const Tensor& value, bool watched) {
  if (value.is_view() || value.output_nr() != 0) return nullptr;
  if (const auto* node = node_of<generated::NativeGroupNormBackward0>(value)) return of_group_norm(*node, watched);
  if (const auto* node = node_of<generated::SiluBackward0>(value)) {
    return of_activation(*node, watched, [](const Tensor& x) { return at::silu(x); });
  }
  if (const auto* node = node_of<generated::HardswishBackward0>(value)) {
    return of_activation(*node, watched, [](const Tensor& x) { return at::hardswish(x); });
  }
  if (const auto* node = node_of<generated::MishBackward0>(value)) {
    return of_activation(*node, watched, [](const Tensor& x) { return at::mish(x); });
  }
  if (const auto* node = node_of<generated::GeluBackward0>(value)) {
    return of_activation(*node, watched, [how = node->approximate](const Tensor& x) { return at::gelu(x, how); });
  }
  return nullptr;
}

class ComputedAgain : public SavedVariableHooks {
 public:
  explicit ComputedAgain(RecipePtr recipe) : recipe_(std::move(recipe)) {}
  void call_pack_hook(const Tensor&) override {}
  Tensor call_unpack_hook() override { return recipe_->compute(); }

  // Compiled autograd traces a function of Python and what it is given: the value itself, which each backward pass asks
  // for anew.
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data() const override {
    const pybind11::gil_scoped_acquire gil;
    const auto held = [](PyObject* object) { return c10::SafePyObject(object, getPyInterpreter()); };
    pybind11::object given = pybind11::module_::import("freezekit.enabling").attr("as_given");
    return std::pair(held(given.release().ptr()), held(THPVariable_Wrap(recipe_->compute())));
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

RecipePtr recipe_for(const Tensor& value, bool watched) {
  if (!watched && at::SavedTensorDefaultHooks::get_hooks()) return nullptr;
  RecipePtr recipe = candidate_for(value, watched);
  if (!recipe) return nullptr;
  const bool has_data = !value.is_meta() && !value.key_set().has(c10::DispatchKey::Python);
  return !has_data || recipe->gives(value) ? recipe : nullptr;
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

void note_bias(const Tensor& result, const Tensor& bias) {
  const auto* node = node_of<generated::NativeGroupNormBackward0>(result);
  if (node) new_note(node).bias = bias.getIntrusivePtr();
}

}  // namespace freezekit::chain
