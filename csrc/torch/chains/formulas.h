// Values that torch's nodes tell to be cheap formulas of tensors which the graph keeps: the difference of two features of
// which both are kept, the sigmoid of a multiple of what it is multiplied with.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <optional>
#include <typeinfo>

#include "torch/chains/recipes.h"

namespace freezekit::chain {

// The node as one of that very class; else null. There is one type_info of each, torch's: to compare names, which differ
// late, takes longer than all else that most calls are asked. Were there two, a node would be taken for none of these.
template <class T>
const T* as(const torch::autograd::Node* node) {
  return node && &typeid(*node) == &typeid(T) ? static_cast<const T*>(node) : nullptr;
}
template <class T>
T* as(torch::autograd::Node* node) {
  return const_cast<T*>(as<T>(static_cast<const torch::autograd::Node*>(node)));
}

// A node that another thread may be going backward through: what it saved is read, and replaced, under its lock.
// Raises where the node is busy: waiting could be for ever, and without a recipe all is kept as in torch. A node that this
// thread is running is locked already.
class NodeLock {
 public:
  explicit NodeLock(const torch::autograd::Node& node) {
    if (&node == torch::autograd::get_current_node().get()) return;
    lock_ = std::unique_lock(Access::mutex_of(node), std::try_to_lock);
    TORCH_CHECK(lock_.owns_lock(), node.name(), " is being run by another thread");
  }

 private:
  struct Access : torch::autograd::Node {
    static std::mutex& mutex_of(const Node& node) { return const_cast<Node&>(node).*(&Access::mutex_); }
  };

  std::unique_lock<std::mutex> lock_;
};

// Whether a value of that node may be one.
bool makes_formula(const torch::autograd::Node* node);

// The node's result, where it keeps that; else null.
torch::autograd::SavedVariable* saved_result(torch::autograd::Node* node);

// Where that is all of the formula: the sigmoid of `beside` or of a multiple of it, as freezekit itself computes that.
std::shared_ptr<Recipe> own_sigmoid_for(const Tensor& value, const Tensor& beside);

// Null where some part of the formula is kept by nobody. `beside`, `watched`: as for recipe_for.
std::shared_ptr<Recipe> formula_for(const Tensor& value, const Tensor& beside, bool watched, bool has_data);

// Whether a value of that node has the elements of a quotient, in other places.
bool makes_moved_quotient(const torch::autograd::Node* node);

// Null where the node of the quotient does not keep both of its operands.
std::shared_ptr<Recipe> moved_quotient_for(const Tensor& value, bool watched, bool has_data);

// There is a recipe, which is held, for what the node keeps in `variable`: it keeps the value no more. What is returned
// serves it and a node that asks sooner in backward; null where the node stays as it is.
RecipePtr let_go(torch::autograd::Node* node, torch::autograd::SavedVariable& variable, bool is_result,
                 const Tensor& value, RecipePtr recipe, bool watched);

// Whether what the node keeps is itself a recipe.
bool keeps_recipe(const torch::autograd::Node* node);

// The value of a tensor without dimensions, if that is at hand.
std::optional<at::Scalar> number_in(const Tensor& tensor);

// The number that was added to a tensor, if it was one.
std::optional<at::Scalar> number_added(const torch::autograd::Node* node);

}  // namespace freezekit::chain
