// Activations and products whose operand can be computed again from what the graph keeps anyway, and activations that keep
// a rounded derivative instead, where that is asked for.
#include "torch/enable/chain.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>

#include "torch/enable/call.h"
#include "torch/enable/operator.h"
#include "torch/lossy/lossy.h"

namespace freezekit::enable {
namespace {

using chain::Maker;
using chain::Slot;

using at::Scalar;

using Unary = Stock<Tensor(const Tensor&)>;
using InplaceUnary = Stock<Tensor&(Tensor&)>;
using Gelu = Stock<Tensor(const Tensor&, std::string_view)>;
using InplaceGelu = Stock<Tensor&(Tensor&, std::string_view)>;
using Elu = Stock<Tensor(const Tensor&, const Scalar&, const Scalar&, const Scalar&)>;
using Softplus = Stock<Tensor(const Tensor&, const Scalar&, const Scalar&)>;
using Product = Stock<Tensor(const Tensor&, const Tensor&)>;
using Sum = Stock<Tensor(const Tensor&, const Tensor&, const Scalar&)>;
using Power = Stock<Tensor(const Tensor&, const Scalar&)>;
using Loss = Stock<Tensor(const Tensor&, const Tensor&, int64_t)>;

// Torch's operator with a lossy node, of a call in place or not.
template <class Op, class X, class... Rest>
decltype(auto) lossily(const Op& op, DispatchKeySet keys, X& x, const lossy::Activation& f, int bits, Rest... rest) {
  if constexpr (std::is_const_v<X>) {
    return lossy::record(x, f, bits, [&] { return op.forward(keys, x, rest...); });
  } else {
    lossy::record_(x, f, bits, [&] { op.unrecorded(keys, x, rest...); });
    return (x);
  }
}

// `x` may be the result as well. `f`: what it is to lossy.h, if that knows it.
template <class Op, class X, class... Rest>
decltype(auto) activation(const Op& op, DispatchKeySet keys, X& x, const std::optional<lossy::Activation>& f,
                          Rest... rest) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, rest...);
  // In place of a view, the node is one of the view's base.
  const bool is_view_in_place = !std::is_const_v<X> && x.is_view();
  const RecipePtr recipe = is_view_in_place ? nullptr : recipe_for(x, Maker::norm);
  if (!recipe) {
    const int bits = lossy::bits();
    const bool is_lossy = bits != 0 && f && serves(Value::ours, x) && lossy::gains(x, *f, bits);
    return is_lossy ? lossily(op, keys, x, *f, bits, rest...) : op.stock(keys, x, rest...);
  }
  decltype(auto) y = [&]() -> decltype(auto) {
    const chain::Unseen unseen;
    return op.stock(keys, x, rest...);
  }();
  chain::keep(y, Slot::self, x, recipe);
  return y;
}

using lossy::Kind;

std::optional<lossy::Activation> only(Kind kind) { return lossy::Activation{kind}; }

std::optional<lossy::Activation> gelu_by(std::string_view approximate) {
  if (approximate == "none") return only(Kind::gelu);
  return approximate == "tanh" ? only(Kind::gelu_tanh) : std::nullopt;
}

std::optional<double> number(const Scalar& scalar) {
  const bool is_number = !scalar.isSymbolic() && (scalar.isFloatingPoint() || scalar.isIntegral(/*includeBool=*/false));
  return is_number ? std::optional(scalar.toDouble()) : std::nullopt;
}

std::optional<lossy::Activation> with(Kind kind, const Scalar& a, const Scalar& b, const Scalar& c = 0) {
  const auto x = number(a), y = number(b), z = number(c);
  return x && y && z ? std::optional(lossy::Activation{kind, *x, *y, *z}) : std::nullopt;
}

template <Kind kKind>
Tensor plain(const Unary& op, DispatchKeySet keys, const Tensor& x) {
  return activation(op, keys, x, only(kKind));
}
template <Kind kKind>
Tensor& plain_(const InplaceUnary& op, DispatchKeySet keys, Tensor& x) {
  return activation(op, keys, x, only(kKind));
}

Tensor gelu(const Gelu& op, DispatchKeySet keys, const Tensor& x, std::string_view approximate) {
  return activation(op, keys, x, gelu_by(approximate), approximate);
}
Tensor& gelu_(const InplaceGelu& op, DispatchKeySet keys, Tensor& x, std::string_view approximate) {
  return activation(op, keys, x, gelu_by(approximate), approximate);
}

Tensor elu(const Elu& op, DispatchKeySet keys, const Tensor& x, const Scalar& alpha, const Scalar& scale,
           const Scalar& input_scale) {
  return activation(op, keys, x, with(Kind::elu, alpha, scale, input_scale), alpha, scale, input_scale);
}
Tensor softplus(const Softplus& op, DispatchKeySet keys, const Tensor& x, const Scalar& beta, const Scalar& threshold) {
  return activation(op, keys, x, with(Kind::softplus, beta, threshold), beta, threshold);
}

RecipePtr recipe_of_any(const Tensor& value) {
  const RecipePtr recipe = recipe_for(value, Maker::activation);
  return recipe ? recipe : recipe_for(value, Maker::formula);
}

template <class Op, class... Rest>
Tensor of_two(const Op& op, DispatchKeySet keys, const Tensor& a, const RecipePtr& of_a, const Tensor& b,
              const RecipePtr& of_b, Rest... rest) {
  if (!of_a && !of_b) return op.stock(keys, a, b, rest...);
  const Tensor y = [&] {
    const chain::Unseen unseen;
    return op.stock(keys, a, b, rest...);
  }();
  chain::keep(y, Slot::self, a, of_a);
  chain::keep(y, Slot::other, b, of_b);
  return y;
}

// A factor is kept for the other's gradient. As in x * sigmoid(x), one may be a formula of the other.
Tensor mul(const Product& op, DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (is_unrecorded(a, b)) return op.unrecorded(keys, a, b);
  if (!a.requires_grad() || !b.requires_grad()) return op.stock(keys, a, b);
  RecipePtr of_a = recipe_for(a, Maker::activation), of_b = recipe_for(b, Maker::activation);
  const auto formula = [](const Tensor& factor, const Tensor& other, const RecipePtr& of_other) {
    return recipe_for(factor, Maker::formula, of_other ? Tensor() : other);
  };
  if (!of_a) of_a = formula(a, b, of_b);
  if (!of_b) of_b = formula(b, a, of_a);
  return of_two(op, keys, a, of_a, b, of_b);
}

// Keeps nothing; but x * (1 + tanh(x)) is a formula of x as long as the number is known.
Tensor add(const Sum& op, DispatchKeySet keys, const Tensor& a, const Tensor& b, const Scalar& alpha) {
  if (is_unrecorded(a, b)) return op.unrecorded(keys, a, b, alpha);
  const Tensor y = op.stock(keys, a, b, alpha);
  if (b.unsafeGetTensorImpl()->is_wrapped_number() && a.device().is_cpu() && serves(Value::ours, a)) {
    chain::note_number(y, b);
  }
  return y;
}

Tensor pow(const Power& op, DispatchKeySet keys, const Tensor& x, const Scalar& exponent) {
  if (is_unrecorded(x)) return op.unrecorded(keys, x, exponent);
  if (const RecipePtr recipe = recipe_of_any(x)) {
    const Tensor y = [&] {
      const chain::Unseen unseen;
      return op.stock(keys, x, exponent);
    }();
    chain::keep(y, Slot::self, x, recipe);
    return y;
  }
  const Tensor y = op.stock(keys, x, exponent);
  if (x.device().is_cpu() && serves(Value::ours, x)) chain::note_power(y);
  return y;
}

Tensor mse_loss(const Loss& op, DispatchKeySet keys, const Tensor& a, const Tensor& b, int64_t reduction) {
  if (is_unrecorded(a, b)) return op.unrecorded(keys, a, b, reduction);
  return of_two(op, keys, a, recipe_of_any(a), b, recipe_of_any(b), reduction);
}

StandIn<plain<Kind::silu>> of_silu("silu");
StandIn<plain_<Kind::silu>> of_silu_("silu_");
StandIn<plain<Kind::hardswish>> of_hardswish("hardswish");
StandIn<plain_<Kind::hardswish>> of_hardswish_("hardswish_");
StandIn<plain<Kind::mish>> of_mish("mish");
StandIn<plain_<Kind::mish>> of_mish_("mish_");
StandIn<gelu> of_gelu("gelu");
StandIn<gelu_> of_gelu_("gelu_");
StandIn<elu> of_elu("elu");
StandIn<softplus> of_softplus("softplus");
StandIn<mul> of_mul("mul.Tensor");
StandIn<add> of_add("add.Tensor");
StandIn<pow> of_pow("pow.Tensor_Scalar");
StandIn<mse_loss> of_mse_loss("mse_loss");

// What is told before all else, since most calls on small tensors have nothing else to do. The sizes of a subclass may be
// a function of Python's, which a mode would see: it is asked once the call is known to be served.
bool is_small(const Tensor& value) { return !value.key_set().has(c10::DispatchKey::Python) && !chain::is_large(value); }

}  // namespace

// A recipe is tried on the value, which on a GPU would have to be waited for. Compilers have chains of their own.
RecipePtr recipe_for(const Tensor& value, Maker maker, const Tensor& beside) {
  const bool may_have = value.device().is_cpu() && !is_small(value) && chain::has_maker(value, maker) &&
                        serves(Value::ours, value) && chain::is_large(value);
  return may_have ? chain::recipe_for(value, maker, detail::is_watched_here(), beside) : nullptr;
}

void note_norm(const Tensor& result, const Tensor& bias, double eps) {
  const bool may_have = result.device().is_cpu() && !is_small(result) && serves(Value::ours, result, bias);
  if (may_have && chain::is_large(result)) chain::note_norm(result, bias, eps);
}

}  // namespace freezekit::enable
