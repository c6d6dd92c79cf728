// The recipes that there are. None of them holds a graph.
#pragma once

#include <functional>

#include "torch/chains/chain.h"

namespace freezekit::chain {

// A tensor and its version, as autograd's SavedVariable.
class Held {
 public:
  explicit Held(const Tensor& tensor) : tensor_(tensor.detach()), version_(tensor_._version()) {}
  const Tensor& get() const;

 private:
  Tensor tensor_;
  uint32_t version_;
};

// Of a group norm: x as its node keeps it, mean and rstd of (N, groups), weight and bias of (C,) or undefined. Null for
// dtypes and layouts that are not computed here.
RecipePtr group_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias);

using Function = std::function<Tensor(const Tensor&)>;

// f(x), by torch's operator, of a tensor that is kept or of what another recipe gives.
RecipePtr function_of(const Tensor& x, Function f);
RecipePtr function_of(RecipePtr x, Function f);

}  // namespace freezekit::chain
