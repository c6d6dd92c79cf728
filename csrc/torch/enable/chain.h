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

// After a layer norm of torch's, or a group norm over (N, C, ...), for the activation behind it.
void note_norm(const Tensor& result, const Tensor& bias, double eps);

}  // namespace freezekit::enable
