// Chains at torch's operators, for their stand-ins and for converted layers.
#pragma once

#include "torch/chains/chain.h"

namespace freezekit::enable {

using at::Tensor;
using chain::RecipePtr;

// A recipe for the operand of a call; null where there is none, and where the call is torch's alone.
RecipePtr recipe_for(const Tensor& value, chain::Maker maker, const Tensor& beside = Tensor());

// The same for an activation behind a norm that is called at a converted layer; null while freezekit is enabled, as torch's
// operator then does what the layer would.
RecipePtr recipe_at_layer(const Tensor& value);

// The same for what a convolution or a Linear with a weight that learns reads, whoever made it; flattened too, as linear
// layers do it.
RecipePtr recipe_for_learning_layer(const Tensor& input, const Tensor& weight);

// Torch's call on two operands, of which those with a recipe are not kept.
template <class Call>
Tensor without_operands(const Call& call, const Tensor& a, const RecipePtr& of_a, const Tensor& b,
                        const RecipePtr& of_b) {
  const Tensor y = [&] {
    const chain::Unseen unseen;
    return call();
  }();
  chain::keep(y, chain::Slot::self, a, of_a);
  chain::keep(y, chain::Slot::other, b, of_b);
  return y;
}

// After a layer norm of torch's, or a group norm over (N, C, ...), for the activation behind it.
void note_norm(const Tensor& result, const Tensor& bias, double eps);

}  // namespace freezekit::enable
