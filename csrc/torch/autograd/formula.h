// A backward node for layers whose gradients are one formula of the output's gradient, a few tensors and some settings.
//
// What the node keeps is what it is given and nothing else; the formula is made of differentiable operators, so double
// backward needs no more than running it with gradients recorded.
//
// A formula is a struct F of settings, default constructible, with
//   auto fields()                      a std::tie of all settings: compiled autograd traces with them, packs and unpacks them
//   variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const
//                                      of the node's inputs; those that are not wanted stay undefined and cost nothing
//   Link link() const                  what else stock's gradients are functions of
// A node that reads more than the first of its gradients has variable_list of_all(const variable_list&, Kept, const Wanted&).
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "torch/autograd/kept.h"
#include "torch/autograd/node.h"

namespace freezekit {

using at::Tensor;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::PackedArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// The tensors that a node keeps, each unpacked when it is asked for.
using Kept = c10::function_ref<Tensor(size_t)>;

// Which gradients are wanted, one for each input of a node.
using Wanted = c10::SmallVector<bool, 4>;

inline std::vector<c10::SymInt> owned(c10::SymIntArrayRef sizes) { return {sizes.begin(), sizes.end()}; }

// Stock's backward operators take a layer's operands whether they read their values or not. So under create_graph a
// gradient requires grad wherever an operand does, and its own backward pass hands that operand zeros, or nothing.
// Optimizers, DDP and autograd.grad tell these apart. A link repeats what stock does.
struct Link {
  enum class To : int8_t {
    nothing,
    operands,  // the first `count` inputs of the node
    result,    // what the layer gave: stock saved its result, and reads it instead of the input
  };
  To to = To::nothing;
  size_t count = 1;
  bool zeros = false;    // they receive zeros of the gradient's size; else nothing
  bool lasting = false;  // gradients of the gradient are linked in their turn
};

// `gradient` as a function of what is behind the edges `to` as well, which receive zeros of its size, or nothing.
Tensor linked(const Tensor& gradient, const torch::autograd::edge_list& to, bool zeros, bool lasting);

// What all formulas' nodes share.
class BackwardNode : public torch::autograd::Node {
 public:
  explicit BackwardNode(const char* name) : name_(name) {}

  template <class... Tensors>
  void keep(const Tensors&... tensors) {
    (kept_.emplace_back(tensors), ...);
  }

  // After a call in place on a view: the gradient of the view comes through the whole tensor's node, which runs this one.
  void set_view(const Tensor& result) { view_ = WeakNodePtr(result.grad_fn()); }

  std::string name() const override { return name_; }
  void release_variables() override;

 protected:
  // What the engine asks for now, which autograd.grad(loss, subset) narrows, not what the graph could give.
  Wanted wanted() const;
  void add_links(const Link&, variable_list& gradients);
  // Raises as torch does once the graph is freed: torch's node keeps a tensor, where this one may keep none.
  void check_unreleased() const;
  Tensor kept(size_t i) {
    const KeptTensor& kept = kept_[i];
    return kept.unpack(kept.is_result ? pointer_to<torch::autograd::Node>(*this) : AnyNodePtr());
  }

  const char* name_;
  c10::SmallVector<KeptTensor, 2> kept_;

 private:
  WeakNodePtr view_{AnyNodePtr()};
  bool is_released_ = false;
};

namespace formula {

// What formulas are made of, apart from numbers, arrays of them, strings and enums: lists of sizes, which differ from one call
// to the next, and settings of the layer, which do not. Both may be symbolic while a forward pass is traced; compiled autograd
// meets nodes of calls on data, where settings are known.
template <class T>
constexpr bool is_list =
    std::is_same_v<T, std::vector<c10::SymInt>> || std::is_same_v<T, c10::SmallVector<c10::SymInt, 4>>;
template <class T>
constexpr bool is_sizes = is_list<T> || std::is_same_v<T, std::array<c10::SymInt, 4>>;
template <class T>
constexpr bool is_setting = std::is_same_v<T, std::array<c10::SymInt, 2>>;
template <class T>
constexpr bool is_numbers = false;
template <size_t kCount>
constexpr bool is_numbers<std::array<int64_t, kCount>> = true;

template <class T>
void collect(CompiledNodeArgs& args, const T& field) {
  if constexpr (is_sizes<T>) {
    args.collect(c10::SymIntArrayRef(field));
  } else if constexpr (is_setting<T>) {
    for (const c10::SymInt& number : field) args.collect(number.expect_int());
  } else if constexpr (is_numbers<T>) {
    for (const int64_t number : field) args.collect(number);
  } else if constexpr (std::is_same_v<T, c10::SymInt>) {
    args.collect(field.expect_int());
  } else if constexpr (std::is_enum_v<T>) {
    args.collect(static_cast<int64_t>(field));
  } else {
    args.collect(field);
  }
}

template <class T>
void pack(PackedArgs& args, const T& field) {
  if constexpr (is_sizes<T> || is_setting<T>) {
    args.pack(std::vector<c10::SymInt>(field.begin(), field.end()));
  } else if constexpr (is_numbers<T>) {
    args.pack(std::vector<int64_t>(field.begin(), field.end()));
  } else if constexpr (std::is_enum_v<T>) {
    args.pack(static_cast<int64_t>(field));
  } else {
    args.pack(field);
  }
}

template <class T>
void unpack(PackedArgs& args, T& field) {
  if constexpr (is_sizes<T> || is_setting<T>) {
    const auto numbers = args.unpack<std::vector<c10::SymInt>>();
    if constexpr (is_list<T>) field.resize(numbers.size());
    std::copy(numbers.begin(), numbers.end(), field.begin());
  } else if constexpr (is_numbers<T>) {
    std::ranges::copy(args.unpack<std::vector<int64_t>>(), field.begin());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(args.unpack<int64_t>());
  } else {
    field = args.unpack<T>();
  }
}

template <class T, class F>
void each_size(T& field, const F& f) {
  if constexpr (is_sizes<T>) {
    for (c10::SymInt& size : field) f(size);
  }
}

template <class F, class Visit>
void each_field(F& formula, const Visit& visit) {
  std::apply([&](auto&... field) { (visit(field), ...); }, formula.fields());
}

}  // namespace formula

template <class F>
constexpr bool takes_sparse = requires { F::kTakesSparse; };

template <class F>
constexpr bool takes_all = requires { &F::of_all; };

// Compiled autograd (torch._dynamo.compiled_autograd) traces a backward pass as a function of what nodes saved. A node says
// what a compiled pass depends on (compiled_args), and offers its apply as a pure function of values that fit into an fx
// graph.
using FunctionalApply = torch::autograd::variable_list (*)(const torch::autograd::variable_list& grads,
                                                           const std::vector<c10::IValue>& arguments);

// Puts a call of `apply` with these arguments into the graph being traced; returns what stands for its results there.
inline torch::autograd::variable_list trace_call(const torch::autograd::Node& node, const std::string& name,
                                                 FunctionalApply apply, const torch::autograd::variable_list& grads,
                                                 PackedArgs arguments, SwapSavedVariables& saved) {
  namespace compiler = torch::dynamo::autograd;
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  const auto metadata = compiler::IValuePacker<Metadata>::pack(compiler::get_input_metadata(node.next_edges()));
  std::vector<at::TypePtr> schema;
  for (const auto& value : arguments.vec()) {
    // A tensor's own type would fix its shape.
    schema.push_back(value.isTensor() ? at::TensorType::get() : value.type());
  }
  const auto& python = compiler::getPyCompilerInterface();
  const std::string bound = python->bind_function(saved.get_py_compiler(), name, apply, schema,
                                                  /*is_custom_function=*/true, /*is_traceable=*/true);
  return python->call_function(saved.get_py_compiler(), "apply_functional", bound, grads, arguments.vec(), metadata);
}

// A node of a formula, as compiled autograd sees it.
template <class F>
class CompiledNode : public BackwardNode {
 public:
  CompiledNode(const char* name, F&& formula) : BackwardNode(name), formula_(std::move(formula)) {}

  void compiled_args(CompiledNodeArgs& args) const override {
    check_unreleased();
    args.collect(name());
    formula::each_field(const_cast<F&>(formula_), [&](const auto& field) { formula::collect(args, field); });
    for (const bool want : wanted()) args.collect(want);
    for (const KeptTensor& kept : kept_) args.collect(kept.variable, kept.is_result);
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    const auto each_size = [&](const auto& f) {
      formula::each_field(formula_, [&](auto& field) { formula::each_size(field, f); });
    };
    each_size([&](c10::SymInt& size) { saved.before(size); });
    for (KeptTensor& kept : kept_) saved.before(kept.variable);
    PackedArgs arguments;
    formula::each_field(formula_, [&](const auto& field) { formula::pack(arguments, field); });
    arguments.pack(static_cast<int64_t>(kept_.size()));
    for (size_t i = 0; i < kept_.size(); ++i) arguments.pack(kept(i));
    const Wanted want = wanted();
    arguments.pack(std::vector<bool>(want.begin(), want.end()));
    variable_list gradients = trace_call(*this, name(), of_values, grads, std::move(arguments), saved);
    each_size([&](c10::SymInt& size) { saved.after(size); });
    for (KeptTensor& kept : kept_) saved.after(kept.variable);
    return gradients;
  }

 protected:
  F formula_;

 private:
  // apply as a function of values alone.
  static variable_list of_values(const variable_list& grads, const std::vector<c10::IValue>& packed) {
    PackedArgs arguments(packed);
    F formula;
    formula::each_field(formula, [&](auto& field) { formula::unpack(arguments, field); });
    variable_list kept(arguments.unpack<int64_t>());
    for (Tensor& tensor : kept) tensor = arguments.unpack<Tensor>();
    const auto want = arguments.unpack<std::vector<bool>>();
    const auto kept_at = [&](size_t i) { return kept[i]; };
    if constexpr (takes_all<F>) {
      return formula.of_all(grads, kept_at, Wanted(want.begin(), want.end()));
    } else {
      if (!grads[0].defined()) return variable_list(want.size());
      return formula.gradients(grads[0], kept_at, Wanted(want.begin(), want.end()));
    }
  }
};

template <class F>
class FormulaNode : public CompiledNode<F> {
 public:
  using CompiledNode<F>::CompiledNode;

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    if (!grads[0].defined()) return variable_list(this->num_outputs());
    this->check_unreleased();
    if constexpr (!takes_sparse<F>) {
      const auto layout = grads[0].layout();
      TORCH_CHECK_NOT_IMPLEMENTED(layout == at::kStrided, this->name_, " takes no gradient of layout ", layout,
                                  ", as torch's own operator takes none");
    }
    const auto kept = [this](size_t i) { return this->kept(i); };
    variable_list gradients = this->formula_.gradients(grads[0], kept, this->wanted());
    if (c10::GradMode::is_enabled()) this->add_links(this->formula_.link(), gradients);
    return gradients;
  }
};

// A node whose results are the gradients of `inputs`, in that order; none where no gradient is recorded. Undefined inputs
// keep their place.
template <class F, class... Inputs>
NodePtr<FormulaNode<F>> formula_node(const char* name, F&& formula, const Inputs&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) return {};
  auto node = make_node<FormulaNode<F>>(name, std::move(formula));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// What `compute` gives below autograd.
template <class Compute>
auto below_autograd(const Compute& compute) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return compute();
}

// `result` with `node`, if there is one, as its history; the node keeps these tensors.
template <class Node, class... Tensors>
Tensor with_history(Tensor result, const Node& node, const Tensors&... kept) {
  if (!node) return result;
  if constexpr (sizeof...(kept) > 0) node->keep(kept...);
  torch::autograd::set_history(result, node);
  return result;
}

// The same for a tensor that has been written to.
template <class Node>
void set_history_in_place(Tensor& written, const Node& node, const Tensor& kept) {
  torch::autograd::impl::bump_version(written);
  if (!node) return;
  node->keep(kept);
  torch::autograd::impl::rebase_history(written, {node, node->add_input_metadata(written)});
}

template <class Node, class Compute>
Tensor recorded(const Node& node, const Compute& compute) {
  return with_history(below_autograd(compute), node);
}

}  // namespace freezekit
