// Torch's own nodes, which keep their operands in members that everybody can see.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ScopeExit.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/torch_dispatch_mode.h>

#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "torch/autograd/node.h"
#include "torch/chains/formulas.h"
#include "torch/chains/recipes.h"

namespace freezekit::chain {
namespace {

namespace generated = torch::autograd::generated;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::SavedVariableHooks;

// From here on making a recipe and computing it takes less than 1.15 of a step that is one call on a small tensor, and 0.45 ns
// for each byte (docs/enable.md). With fewer bytes less is saved for nearly the same time.
std::atomic<int64_t> least_bytes = 8192;

// What is known of the last nodes, by address and number: another node that has the address later has another number, of
// those that this thread made.
struct Note {
  const Node* node = nullptr;
  uint64_t number_of_node = 0;
  bool has_bias = false;
  double eps = 0;
  std::optional<Vector> bias;
  // A copy of a batch norm's, in the dtype of its result: instance norm repeats its bias for each image, and lets go of that.
  std::vector<char> bias_bytes;
  std::weak_ptr<const Recipe> recipe;
  // Of a norm: for its result, as long as a node that reads it has it. Another one has the same, and no copies of its own.
  std::weak_ptr<const Recipe> for_result;
  std::optional<at::Scalar> number;
};

thread_local std::array<Note, 16> notes;
thread_local size_t next_note = 0;

thread_local bool shows_recipe = false, shows_let_go = false;

// A hook on what is saved is shown what `tensors` gives while the flag is set; it may raise. What it made of them is
// returned: it tells by its life how long they are kept.
template <class F>
std::vector<SavedVariable> show(bool& flag, const F& tensors) {
  std::vector<SavedVariable> made;
  if (!at::SavedTensorDefaultHooks::get_hooks()) return made;
  flag = true;
  const auto shown = c10::make_scope_exit([&] { flag = false; });
  for (const Tensor& tensor : tensors()) made.emplace_back(tensor, /*is_output=*/false);
  return made;
}

Note& new_note(const Node* node) {
  Note& note = notes[next_note++ % notes.size()];
  note = Note{};
  note.node = node;
  note.number_of_node = node->sequence_nr();
  return note;
}

Note* note_of(const Node* node) {
  for (size_t age = 1; age <= notes.size(); ++age) {
    Note& note = notes[(next_note - age) % notes.size()];
    if (note.node == node && note.number_of_node == node->sequence_nr()) return &note;
  }
  return nullptr;
}

// The node behind a tensor; a view's is asked for as torch does it, which may make it anew.
Node* node_of(const Tensor& result) {
  const auto* const meta = torch::autograd::impl::get_autograd_meta(result);
  return meta && !meta->is_view_ ? meta->grad_fn_.get() : result.grad_fn().get();
}

// Has the hooks pack and unpack. What torch hands to them, a detached tensor, they do not look at: below autograd it is
// made without a node of its own.
void register_hooks(SavedVariable& variable, std::unique_ptr<SavedVariableHooks> hooks) {
  const at::AutoDispatchBelowADInplaceOrView below;
  variable.register_hooks(std::move(hooks));
}

// A tensor that hooks have not taken is there without what autograd knows of it. Undefined once the graph is freed.
template <class T>
Tensor statistic(const T& node, const SavedVariable& variable) {
  if (const auto raw = variable.get_raw_data()) return *raw;
  return variable.unpack(pointer_to(const_cast<T&>(node)));
}

std::shared_ptr<Recipe> of_group_norm(const generated::NativeGroupNormBackward0& node, bool watched, bool has_data) {
  const NodeLock lock(node);
  if ((node.input_.has_hooks() || node.weight_.has_hooks()) && !watched) return nullptr;
  const Note* note = note_of(&node);
  if (!note) return nullptr;
  const Tensor weight = node.weight_.unpack();
  Tensor bias = note->bias ? note->bias->tensor() : Tensor();
  if (!has_data && note->has_bias) bias = weight;  // of the same size, which is all that counts there
  if (has_data && note->has_bias != bias.defined()) return nullptr;
  const Tensor mean = statistic(node, node.result1_), rstd = statistic(node, node.result2_);
  if (!mean.defined() || !rstd.defined()) return nullptr;
  return group_norm(node.input_.unpack(), weight, bias, mean, rstd, note->eps, has_data);
}

std::shared_ptr<Recipe> of_batch_norm(const generated::NativeBatchNormBackward0& node, at::IntArrayRef size,
                                      bool watched, bool has_data) {
  const NodeLock lock(node);
  if ((node.input_.has_hooks() || node.weight_.has_hooks()) && !watched) return nullptr;
  const Note* note = note_of(&node);
  if (!note || !node.training) return nullptr;
  const Tensor mean = statistic(node, node.result1_), rstd = statistic(node, node.result2_);
  if (!mean.defined() || !rstd.defined()) return nullptr;
  const Tensor x = node.input_.unpack();
  Tensor bias;
  if (note->has_bias && !has_data) {
    bias = mean;  // of the same size, which is all that counts there
  } else if (note->has_bias) {
    const int64_t count = note->bias_bytes.size() / x.element_size();
    bias = at::from_blob(const_cast<char*>(note->bias_bytes.data()), {count}, x.scalar_type());  // as long as the note
  }
  return batch_norm(x, node.weight_.unpack(), bias, mean, rstd, size, has_data);
}

std::shared_ptr<Recipe> of_layer_norm(const generated::NativeLayerNormBackward0& node, bool watched, bool has_data) {
  const NodeLock lock(node);
  if ((node.input_.has_hooks() || node.weight_.has_hooks() || node.bias_.has_hooks()) && !watched) return nullptr;
  const Note* note = note_of(&node);
  const auto shape = c10::asIntArrayRefSlowOpt(node.normalized_shape);
  if (!note || !shape) return nullptr;
  return layer_norm(node.input_.unpack(), *shape, node.weight_.unpack(), node.bias_.unpack(), note->eps, has_data);
}

// The node, or what is behind it if it is a view's: instance norm is a batch norm's result with other sizes.
const Node* behind_view(const Node* node) {
  if (!as<generated::ViewBackward0>(node)) return node;
  const auto& edge = node->next_edge(0);
  return edge.input_nr == 0 ? edge.function.get() : nullptr;
}

bool is_batch_norm(const Node* node) { return as<generated::NativeBatchNormBackward0>(node); }

bool is_norm(const Node* node) {
  return as<generated::NativeGroupNormBackward0>(node) || as<generated::NativeLayerNormBackward0>(node) ||
         is_batch_norm(node);
}

// What an activation's node computed.
Function operator_of(const generated::SiluBackward0&) {
  return {[](const Tensor& x) { return at::silu(x); }, cpu::Sigmoid{.is_silu = true}};
}
Function operator_of(const generated::HardswishBackward0&) {
  return {[](const Tensor& x) { return at::hardswish(x); }};
}
Function operator_of(const generated::MishBackward0&) {
  return {[](const Tensor& x) { return at::mish(x); }};
}
Function operator_of(const generated::GeluBackward0& node) {
  return {[how = node.approximate](const Tensor& x) { return at::gelu(x, how); }};
}
Function operator_of(const generated::EluBackward0& node) {
  return {[alpha = node.alpha, scale = node.scale, input_scale = node.input_scale](const Tensor& x) {
    return at::elu(x, alpha, scale, input_scale);
  }};
}
Function operator_of(const generated::SoftplusBackward0& node) {
  return {[beta = node.beta, threshold = node.threshold](const Tensor& x) { return at::softplus(x, beta, threshold); }};
}

// f(the node) as what it is, if that is an activation's.
template <class F>
bool visit_activation(Node* node, const F& f) {
  const auto visit = [&]<class... T>(std::tuple<T...>*) { return ((as<T>(node) && (f(*as<T>(node)), true)) || ...); };
  return visit(
      static_cast<std::tuple<generated::SiluBackward0, generated::HardswishBackward0, generated::MishBackward0,
                             generated::GeluBackward0, generated::EluBackward0, generated::SoftplusBackward0>*>(
          nullptr));
}

template <class T>
std::shared_ptr<Recipe> of_activation(const T& node, bool watched, bool has_data) {
  const NodeLock lock(node);
  const Note* note = node.self_.has_hooks() ? note_of(&node) : nullptr;
  if (RecipePtr inner = note ? note->recipe.lock() : nullptr) return function_of(std::move(inner), operator_of(node));
  if (node.self_.has_hooks() && !watched) return nullptr;
  return function_of(node.self_.unpack(), operator_of(node), has_data);
}

std::shared_ptr<Recipe> candidate_for(const Tensor& value, Maker maker, bool watched, const Tensor& beside,
                                      bool has_data) {
  if (maker == Maker::formula) return formula_for(value, beside, watched, has_data);
  if (maker == Maker::moved_quotient) return moved_quotient_for(value, watched, has_data);
  Node* const made = node_of(value);
  if (maker == Maker::norm) {
    if (const auto* node = as<generated::NativeLayerNormBackward0>(made)) {
      return of_layer_norm(*node, watched, has_data);
    }
    if (const auto* node = as<generated::NativeGroupNormBackward0>(made)) {
      return of_group_norm(*node, watched, has_data);
    }
    const auto* const node = as<generated::NativeBatchNormBackward0>(behind_view(made));
    return node ? of_batch_norm(*node, value.sizes(), watched, has_data) : nullptr;
  }
  std::shared_ptr<Recipe> recipe;
  visit_activation(made, [&](const auto& node) { recipe = of_activation(node, watched, has_data); });
  return recipe;
}

class ComputedAgain : public SavedVariableHooks {
 public:
  ComputedAgain(RecipePtr recipe, bool is_last, std::vector<SavedVariable> shown = {})
      : recipe_(std::move(recipe)), is_last_(is_last), shown_(std::move(shown)) {}
  void call_pack_hook(const Tensor&) override {}
  // What was saved is not part of the backward pass: modes of dispatch do not see it, as they do not see a tensor saved.
  Tensor call_unpack_hook() override {
    std::optional<torch::torch_dispatch_mode::StashTorchDispatchStackGuard> no_modes;
    if (c10::impl::TorchDispatchModeTLS::any_modes_set()) no_modes.emplace();
    recipe_->check(/*bytes=*/true);
    return is_last_ ? recipe_->take() : recipe_->compute();
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
  const RecipePtr recipe_;
  const bool is_last_;  // of the nodes that ask for it
  const std::vector<SavedVariable> shown_;
};

SavedVariable* saved_of_activation(Node* node) {
  SavedVariable* saved = nullptr;
  visit_activation(node, [&](auto& activation) { saved = &activation.self_; });
  return saved;
}

SavedVariable* saved(Node* node, Slot slot) {
  const bool is_self = slot == Slot::self;
  if (auto* product = as<generated::MulBackward0>(node)) return is_self ? &product->self_ : &product->other_;
  if (auto* loss = as<generated::MseLossBackward0>(node)) return is_self ? &loss->self_ : &loss->target_;
  if (auto* product = as<generated::BmmBackward0>(node)) return is_self ? &product->self_ : &product->mat2_;
  if (auto* product = as<generated::MmBackward0>(node)) return is_self ? &product->self_ : &product->mat2_;
  if (auto* sum = as<generated::AddmmBackward0>(node)) return is_self ? &sum->mat1_ : &sum->mat2_;
  if (auto* layer = as<generated::ConvolutionBackward0>(node)) return is_self ? &layer->input_ : &layer->weight_;
  if (auto* power = as<generated::PowBackward0>(node)) return &power->self_;
  if (auto* length = as<generated::LinalgVectorNormBackward0>(node)) return is_self ? &length->self_ : &length->result_;
  return saved_of_activation(node);
}

}  // namespace

bool is_for_recipe() { return shows_recipe; }

bool is_let_go() { return shows_let_go; }

bool keeps_recipe(const Node* node) {
  const Note* note = note_of(node);
  return note && !note->recipe.expired();
}

bool is_large(const Tensor& value) {
  const auto elements = value.sym_numel().maybe_as_int();
  return !elements ||
         *elements * static_cast<int64_t>(value.element_size()) >= least_bytes.load(std::memory_order_relaxed);
}

int64_t set_least_bytes(int64_t bytes) { return least_bytes.exchange(bytes); }

bool has_maker(const Tensor& value, Maker maker) {
  // Torch makes the node of a view anew when it is asked for it, once the view was written to.
  if (value.is_view() && (maker == Maker::activation || value._version() > 0)) return false;
  Node* const node = node_of(value);
  switch (maker) {
    case Maker::norm:
      return value.is_view() ? is_batch_norm(behind_view(node)) : is_norm(node);
    case Maker::activation:
      return saved_of_activation(node) != nullptr;
    case Maker::formula:
      return makes_formula(node);
    case Maker::moved_quotient:
      return makes_moved_quotient(node);
  }
  return false;
}

RecipePtr recipe_for(const Tensor& value, Maker maker, bool watched, const Tensor& beside) {
  if (!watched && at::SavedTensorDefaultHooks::get_hooks()) return nullptr;
  const bool has_data = !value.is_meta() && !value.key_set().has(c10::DispatchKey::Python);
  const uint32_t written = maker == Maker::activation ? 1 : 0;  // by the maker, in place
  if (value.output_nr() != 0 || (!has_data && value._version() > written)) return nullptr;
  try {
    Node* const node = node_of(value);
    Note* const norm = maker == Maker::norm ? note_of(behind_view(node)) : nullptr;
    if (const RecipePtr held = norm ? norm->for_result.lock() : nullptr) {
      held->check(/*bytes=*/has_data);
      if (!has_data || held->gives(value)) return held;
    }
    auto recipe = maker == Maker::formula && has_data ? own_sigmoid_for(value, beside) : nullptr;
    if (!recipe || !recipe->gives(value)) {
      recipe = candidate_for(value, maker, watched, beside, has_data);
      if (!recipe) return nullptr;
      recipe->check(/*bytes=*/false);  // of a recipe that is held already
      if (has_data && !recipe->gives(value)) return nullptr;
    }
    recipe->hold();
    if (norm) norm->for_result = recipe;
    // Its node keeps it, too.
    SavedVariable* const result = maker == Maker::formula ? saved_result(node) : nullptr;
    const RecipePtr again = result ? let_go(node, *result, /*is_result=*/true, value, recipe, watched) : nullptr;
    return again ? again : recipe;
  } catch (const c10::Error&) {
    return nullptr;  // what the maker saved is gone, or was written to: backward says so, if there is one
  }
}

Unseen::Unseen() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}

Unseen::~Unseen() { at::SavedTensorDefaultHooks::set_tracing(before_); }

void keep(const Tensor& result, Slot slot, const Tensor& operand, const RecipePtr& recipe) {
  Node* const node = node_of(result);
  SavedVariable* const variable = saved(node, slot);
  if (!variable || variable->has_hooks()) return;
  if (recipe) {
    // Of an activation's result there may be recipes, which are asked sooner in backward.
    const bool is_last = variable == saved_of_activation(node);
    const RecipePtr again = is_last ? shared(recipe) : recipe;
    auto shown = show(shows_recipe, [&] { return recipe->reads(); });
    register_hooks(*variable, std::make_unique<ComputedAgain>(again, is_last, std::move(shown)));
    new_note(node).recipe = again;
  } else if (at::SavedTensorDefaultHooks::get_hooks()) {
    *variable = SavedVariable(operand, /*is_output=*/operand.is_same(result));
  }
}

RecipePtr let_go(Node* node, SavedVariable& variable, bool is_result, const Tensor& value, RecipePtr recipe,
                 bool watched) {
  // One that was written to is an error of torch's in backward.
  if (value._version() > 0 || keeps_recipe(node)) return nullptr;
  const RecipePtr again = shared(std::move(recipe));
  try {
    const NodeLock lock(*node);
    if (variable.has_hooks() && !watched) return nullptr;
    const Unseen unseen;
    if (variable.has_hooks()) variable = SavedVariable(value, is_result);
    register_hooks(variable, std::make_unique<ComputedAgain>(again, /*is_last=*/true));
  } catch (const c10::Error&) {
    return nullptr;  // the node's graph is freed, or going to be
  }
  new_note(node).recipe = again;
  show(shows_let_go, [&] { return std::array{value}; });
  return again;
}

std::optional<at::Scalar> number_added(const Node* node) {
  const Note* note = note_of(node);
  return note ? note->number : std::nullopt;
}

void note_number(const Tensor& result, const Tensor& number) {
  if (!as<generated::AddBackward0>(node_of(result))) return;
  if (const auto value = number_in(number)) new_note(node_of(result)).number = value;
}

void note_norm(const Tensor& result, const Tensor& bias, double eps) {
  const Node* const node = node_of(result);
  if (!is_norm(node) || (is_batch_norm(node) && !is_affine_type(result.scalar_type()))) return;
  Note& note = new_note(node);
  note.has_bias = bias.defined();
  note.eps = eps;
  const bool keeps_bias = as<generated::NativeLayerNormBackward0>(node);
  if (keeps_bias || !note.has_bias || !is_in_memory(bias) || !bias.is_contiguous()) return;
  if (!is_batch_norm(node)) {
    note.bias.emplace(bias);
  } else if (bias.scalar_type() == result.scalar_type()) {
    const char* bytes = static_cast<const char*>(bias.const_data_ptr());
    note.bias_bytes.assign(bytes, bytes + bias.nbytes());
  }
}

}  // namespace freezekit::chain
