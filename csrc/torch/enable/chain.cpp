// Activations and products whose operand can be computed again from what the graph keeps anyway.
#include "torch/enable/chain.h"

#include <ATen/core/Tensor.h>

#include "torch/enable/call.h"
#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

using chain::Maker;
using chain::Operand;

extern Operator<Tensor(const Tensor&)> torch_silu, torch_hardswish, torch_mish;
extern Operator<Tensor&(Tensor&)> torch_silu_inplace, torch_hardswish_inplace, torch_mish_inplace;
extern Operator<Tensor(const Tensor&, std::string_view)> torch_gelu;
extern Operator<Tensor&(Tensor&, std::string_view)> torch_gelu_inplace;
extern Operator<Tensor(const Tensor&, const Tensor&)> torch_mul;

// `x` may be the result as well.
template <class Op, class X, class... Rest>
decltype(auto) activation(const Op& op, DispatchKeySet keys, X& x, Rest... rest) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, rest...);
  const RecipePtr recipe = recipe_for(x, Maker::norm);
  if (!recipe) return op.stock(keys, x, rest...);
  decltype(auto) y = [&]() -> decltype(auto) {
    const chain::Unseen unseen;
    return op.stock(keys, x, rest...);
  }();
  chain::keep(y, Operand::self, x, recipe);
  return y;
}

Tensor silu(DispatchKeySet keys, const Tensor& x) { return activation(torch_silu, keys, x); }
Tensor& silu_(DispatchKeySet keys, Tensor& x) { return activation(torch_silu_inplace, keys, x); }
Tensor hardswish(DispatchKeySet keys, const Tensor& x) { return activation(torch_hardswish, keys, x); }
Tensor& hardswish_(DispatchKeySet keys, Tensor& x) { return activation(torch_hardswish_inplace, keys, x); }
Tensor mish(DispatchKeySet keys, const Tensor& x) { return activation(torch_mish, keys, x); }
Tensor& mish_(DispatchKeySet keys, Tensor& x) { return activation(torch_mish_inplace, keys, x); }
Tensor gelu(DispatchKeySet keys, const Tensor& x, std::string_view approximate) {
  return activation(torch_gelu, keys, x, approximate);
}
Tensor& gelu_(DispatchKeySet keys, Tensor& x, std::string_view approximate) {
  return activation(torch_gelu_inplace, keys, x, approximate);
}

// A factor is kept for the other's gradient.
Tensor mul(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (is_unrecorded(a, b)) return torch_mul.unrecorded(keys, a, b);
  if (!a.requires_grad() || !b.requires_grad()) return torch_mul.stock(keys, a, b);
  const RecipePtr of_a = recipe_for(a, Maker::activation), of_b = recipe_for(b, Maker::activation);
  if (!of_a && !of_b) return torch_mul.stock(keys, a, b);
  const Tensor y = [&] {
    const chain::Unseen unseen;
    return torch_mul.stock(keys, a, b);
  }();
  chain::keep(y, Operand::self, a, of_a);
  chain::keep(y, Operand::other, b, of_b);
  return y;
}

Operator<Tensor(const Tensor&)> torch_silu("silu", TORCH_FN(silu));
Operator<Tensor&(Tensor&)> torch_silu_inplace("silu_", TORCH_FN(silu_));
Operator<Tensor(const Tensor&)> torch_hardswish("hardswish", TORCH_FN(hardswish));
Operator<Tensor&(Tensor&)> torch_hardswish_inplace("hardswish_", TORCH_FN(hardswish_));
Operator<Tensor(const Tensor&)> torch_mish("mish", TORCH_FN(mish));
Operator<Tensor&(Tensor&)> torch_mish_inplace("mish_", TORCH_FN(mish_));
Operator<Tensor(const Tensor&, std::string_view)> torch_gelu("gelu", TORCH_FN(gelu));
Operator<Tensor&(Tensor&, std::string_view)> torch_gelu_inplace("gelu_", TORCH_FN(gelu_));
Operator<Tensor(const Tensor&, const Tensor&)> torch_mul("mul.Tensor", TORCH_FN(mul));

}  // namespace

// A recipe is tried on the value, which on a GPU would have to be waited for. Compilers have chains of their own.
RecipePtr recipe_for(const Tensor& value, Maker maker) {
  const bool may_have = value.device().is_cpu() && chain::has_maker(value, maker) && serves(Value::ours, value);
  return may_have ? chain::recipe_for(value, maker, detail::is_watched_here()) : nullptr;
}

void note_group_norm(const Tensor& result, const Tensor& bias) {
  if (result.device().is_cpu() && serves(Value::ours, result, bias)) chain::note_bias(result, bias);
}

}  // namespace freezekit::enable
