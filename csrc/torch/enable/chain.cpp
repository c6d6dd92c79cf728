// Activations and products whose operand can be computed again from what the graph keeps anyway, and activations that keep
// a rounded derivative instead, where that is asked for.
#include "torch/enable/chain.h"

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/enable/call.h"
#include "torch/enable/operator.h"
#include "torch/lossy/lossy.h"

namespace freezekit::enable {
namespace {

using chain::Maker;
using chain::Slot;

using at::Scalar;

using lossy::Kind;

// Torch's kernel, of whose node no hook is to see what is not kept.
template <class Op, class... Args>
decltype(auto) stock_unseen(const Op& op, DispatchKeySet keys, Args&... args) {
  const chain::Unseen unseen;
  return op.stock(keys, args...);
}

// Torch's operator with a lossy node.
template <class X, class Op, class... Rest>
Served<ResultOf<X>> lossily(const Op& op, DispatchKeySet keys, X x, const lossy::Activation& f, int bits,
                            const Rest&... rest) {
  if constexpr (kInPlace<X>) {
    lossy::record_(x, f, bits, [&] { op.unrecorded(keys, x, rest...); });
    return &x;
  } else {
    return lossy::record(x, f, bits, [&] { return op.forward(keys, x, rest...); });
  }
}

// `f`: what it is to lossy.h, if that knows it.
template <class X, class Op, class... Rest>
Served<ResultOf<X>> activation(const Op& op, DispatchKeySet keys, X x, const std::optional<lossy::Activation>& f,
                               const Rest&... rest) {
  // In place of a view, the node is one of the view's base.
  const bool is_view_in_place = kInPlace<X> && x.is_view();
  const RecipePtr recipe = is_view_in_place ? nullptr : recipe_for(x, Maker::norm);
  if (!recipe) {
    const int bits = lossy::bits();
    const bool is_lossy = bits != 0 && f && serves(Value::ours, x) && lossy::gains(x, *f, bits);
    return is_lossy ? lossily<X>(op, keys, x, *f, bits, rest...) : Served<ResultOf<X>>();
  }
  decltype(auto) y = stock_unseen(op, keys, x, rest...);
  chain::keep(y, Slot::self, x, recipe);
  return served(std::forward<decltype(y)>(y));
}

std::optional<lossy::Activation> gelu_by(std::string_view approximate) {
  if (approximate == "none") return lossy::Activation{Kind::gelu};
  return approximate == "tanh" ? std::optional(lossy::Activation{Kind::gelu_tanh}) : std::nullopt;
}

std::optional<lossy::Activation> with(Kind kind, const Scalar& a, const Scalar& b, const Scalar& c = 0) {
  const auto x = number_in(a), y = number_in(b), z = number_in(c);
  return x && y && z ? std::optional(lossy::Activation{kind, *x, *y, *z}) : std::nullopt;
}

template <Kind kKind, class X>
Served<ResultOf<X>> plain(const Unary<X>& op, DispatchKeySet keys, X x) {
  return activation<X>(op, keys, x, lossy::Activation{kKind});
}

template <class X>
Served<ResultOf<X>> gelu(const Unary<X, std::string_view>& op, DispatchKeySet keys, X x, std::string_view approximate) {
  return activation<X>(op, keys, x, gelu_by(approximate), approximate);
}

using Elu = Stock<Tensor(const Tensor&, const Scalar&, const Scalar&, const Scalar&)>;
using Softplus = Stock<Tensor(const Tensor&, const Scalar&, const Scalar&)>;
using Product = Stock<Tensor(const Tensor&, const Tensor&)>;
using SumWithProduct = Stock<Tensor(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&)>;
using Sum = Stock<Tensor(const Tensor&, const Tensor&, const Scalar&)>;
using Length =
    Stock<Tensor(const Tensor&, const Scalar&, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>)>;
using Power = Stock<Tensor(const Tensor&, const Scalar&)>;
using Loss = Stock<Tensor(const Tensor&, const Tensor&, int64_t)>;

std::optional<Tensor> elu(const Elu& op, DispatchKeySet keys, const Tensor& x, const Scalar& alpha, const Scalar& scale,
                          const Scalar& input_scale) {
  const auto f = with(Kind::elu, alpha, scale, input_scale);
  return activation<const Tensor&>(op, keys, x, f, alpha, scale, input_scale);
}

std::optional<Tensor> softplus(const Softplus& op, DispatchKeySet keys, const Tensor& x, const Scalar& beta,
                               const Scalar& threshold) {
  return activation<const Tensor&>(op, keys, x, with(Kind::softplus, beta, threshold), beta, threshold);
}

RecipePtr recipe_of_any(const Tensor& value) {
  const RecipePtr recipe = recipe_for(value, Maker::activation);
  return recipe ? recipe : recipe_for(value, Maker::formula);
}

template <class Op, class... Rest>
std::optional<Tensor> of_two(const Op& op, DispatchKeySet keys, const Tensor& a, const RecipePtr& of_a, const Tensor& b,
                             const RecipePtr& of_b, const Rest&... rest) {
  if (!of_a && !of_b) return {};
  return without_operands([&] { return op.stock(keys, a, b, rest...); }, a, of_a, b, of_b);
}

// A factor is kept for the other's gradient. As in x * sigmoid(x), one may be a formula of the other.
std::optional<Tensor> mul(const Product& op, DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (!a.requires_grad() || !b.requires_grad()) return {};
  RecipePtr of_a = recipe_for(a, Maker::activation), of_b = recipe_for(b, Maker::activation);
  const auto formula = [](const Tensor& factor, const Tensor& other, const RecipePtr& of_other) {
    return recipe_for(factor, Maker::formula, of_other ? Tensor() : other);
  };
  if (!of_a) of_a = formula(a, b, of_b);
  if (!of_b) of_b = formula(b, a, of_a);
  return of_two(op, keys, a, of_a, b, of_b);
}

// Keeps nothing; but x * (1 + tanh(x)) is a formula of x as long as the number is known.
std::optional<Tensor> add(const Sum& op, DispatchKeySet keys, const Tensor& a, const Tensor& b, const Scalar& alpha) {
  Tensor y = op.stock(keys, a, b, alpha);
  if (b.unsafeGetTensorImpl()->is_wrapped_number() && a.device().is_cpu() && serves(Value::ours, a)) {
    chain::note_number(y, b);
  }
  return y;
}

std::optional<Tensor> pow(const Power& op, DispatchKeySet keys, const Tensor& x, const Scalar& exponent) {
  const RecipePtr recipe = recipe_of_any(x);
  if (recipe) {
    Tensor y = stock_unseen(op, keys, x, exponent);
    chain::keep(y, Slot::self, x, recipe);
    return y;
  }
  Tensor y = op.stock(keys, x, exponent);
  if (x.device().is_cpu() && serves(Value::ours, x)) chain::note_power(y);
  return y;
}

// As a matmul with a quotient, such as a normalised query, comes to it.
std::optional<Tensor> bmm(const Product& op, DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  const bool keeps_both = a.requires_grad() && b.requires_grad();
  if (!keeps_both) return {};
  const RecipePtr of_a = recipe_for(a, Maker::moved_quotient), of_b = recipe_for(b, Maker::moved_quotient);
  return of_two(op, keys, a, of_a, b, of_b);
}

// As in a global response norm, of an activation's result that a product reads too.
std::optional<Tensor> vector_norm(const Length& op, DispatchKeySet keys, const Tensor& x, const Scalar& order,
                                  at::OptionalIntArrayRef dims, bool keeps_dims, std::optional<at::ScalarType> dtype) {
  const RecipePtr recipe = recipe_for(x, Maker::activation);
  if (!recipe) return {};
  Tensor y = stock_unseen(op, keys, x, order, dims, keeps_dims, dtype);
  chain::keep(y, Slot::self, x, recipe);
  chain::keep(y, Slot::other, y, nullptr);
  return y;
}

// Of a Linear with a bias. The factor `b` is its weight.
std::optional<Tensor> addmm(const SumWithProduct& op, DispatchKeySet keys, const Tensor& sum, const Tensor& a,
                            const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const RecipePtr recipe = recipe_for_learning_layer(a, b);
  if (!recipe) return {};
  return without_operands([&] { return op.stock(keys, sum, a, b, beta, alpha); }, a, recipe, b, nullptr);
}

std::optional<Tensor> mm(const Product& op, DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  return of_two(op, keys, a, recipe_for_learning_layer(a, b), b, nullptr);
}

std::optional<Tensor> mse_loss(const Loss& op, DispatchKeySet keys, const Tensor& a, const Tensor& b,
                               int64_t reduction) {
  return of_two(op, keys, a, recipe_of_any(a), b, recipe_of_any(b), reduction);
}

StandIn<plain<Kind::silu, const Tensor&>> of_silu("silu");
StandIn<plain<Kind::silu, Tensor&>> of_silu_("silu_");
StandIn<plain<Kind::hardswish, const Tensor&>> of_hardswish("hardswish");
StandIn<plain<Kind::hardswish, Tensor&>> of_hardswish_("hardswish_");
StandIn<plain<Kind::mish, const Tensor&>> of_mish("mish");
StandIn<plain<Kind::mish, Tensor&>> of_mish_("mish_");
StandIn<gelu<const Tensor&>> of_gelu("gelu");
StandIn<gelu<Tensor&>> of_gelu_("gelu_");
StandIn<elu> of_elu("elu");
StandIn<softplus> of_softplus("softplus");
StandIn<mul> of_mul("mul.Tensor");
StandIn<add> of_add("add.Tensor");
StandIn<pow> of_pow("pow.Tensor_Scalar");
StandIn<bmm> of_bmm("bmm");
StandIn<addmm> of_addmm("addmm");
StandIn<mm> of_mm("mm");
StandIn<vector_norm> of_vector_norm("linalg_vector_norm");
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

RecipePtr recipe_at_layer(const Tensor& value) {
  const bool is_recorded = at::GradMode::is_enabled() && value.requires_grad();
  return is_recorded && !is_enabled() ? recipe_for(value, Maker::norm) : nullptr;
}

RecipePtr recipe_for_learning_layer(const Tensor& input, const Tensor& weight) {
  if (!input.requires_grad() || !weight.requires_grad() || !input.device().is_cpu() || is_small(input)) return nullptr;
  if (!serves(Value::ours, input, weight)) return nullptr;  // sizes are not asked for before
  const bool is_flattened = input.is_view();
  const Tensor value = is_flattened ? Tensor(input._base()) : input;
  if (is_flattened && !chain::is_all_of(input, value)) return nullptr;
  for (const Maker maker : {Maker::activation, Maker::norm, Maker::formula}) {
    if (RecipePtr recipe = recipe_for(value, maker)) {
      return is_flattened ? chain::seen_as(std::move(recipe), input) : recipe;
    }
  }
  return nullptr;
}

void note_norm(const Tensor& result, const Tensor& bias, double eps) {
  const bool may_have = result.device().is_cpu() && !is_small(result) && serves(Value::ours, result, bias);
  if (may_have && chain::is_large(result)) chain::note_norm(result, bias, eps);
}

}  // namespace freezekit::enable
