// The recipes that there are. None of them holds a graph.
#pragma once

#include <functional>

#include "torch/chains/chain.h"

namespace freezekit::chain {

// Whether there are bytes on this machine behind every element, one after another in some order.
bool is_in_memory(const Tensor& tensor);

// A tensor with its version, as autograd's SavedVariable, and a hash of its bytes, if it has any.
class Held {
 public:
  explicit Held(const Tensor& tensor);
  // Raises where it is not what it was.
  const Tensor& get() const;
  // What has just been held.
  const Tensor& unchecked() const { return tensor_; }

 private:
  Tensor tensor_;
  uint32_t version_;
  uint64_t content_;
};

// Whether there may be a recipe for the group norm of x.
bool can_be_made_again(const Tensor& x, const Tensor& weight, const Tensor& bias);

// Of a group norm: x as its node keeps it, mean and rstd of (N, groups), weight and bias of (C,) or undefined, with their
// values when the norm ran. Null for what is not computed here.
RecipePtr group_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                     bool has_data);

using Function = std::function<Tensor(const Tensor&)>;

// f(x), by torch's operator, of a tensor that is kept or of what another recipe gives.
RecipePtr function_of(const Tensor& x, Function f, bool has_data);
RecipePtr function_of(RecipePtr x, Function f);

}  // namespace freezekit::chain
