// Values that torch's nodes tell to be cheap formulas of tensors which the graph keeps: the difference of two features of
// which both are kept, the sigmoid of a multiple of what it is multiplied with.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>

#include "torch/chains/recipes.h"

namespace freezekit::chain {

// Whether a value of that node may be one.
bool makes_formula(const torch::autograd::Node* node);

// The node's result, where it keeps that; else null.
torch::autograd::SavedVariable* saved_result(torch::autograd::Node* node);

// Null where some part of the formula is kept by nobody. `beside`, `watched`: as for recipe_for.
std::shared_ptr<Recipe> formula_for(const Tensor& value, const Tensor& beside, bool watched, bool has_data);

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
