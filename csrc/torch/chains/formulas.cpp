#include "torch/chains/formulas.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ScalarOps.h>
#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/overflows.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "torch/autograd/node.h"

namespace freezekit::chain {
namespace {

namespace generated = torch::autograd::generated;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

constexpr int kDeepest = 5;  // nodes on the way to a tensor that is kept
constexpr int kMoves = 6;    // from a quotient to a matrix product

// The last powers. An edge to what one of them keeps is known by its numbers, and the node is asked whether it is there.
struct Power {
  const Node* operand = nullptr;
  uint32_t nr = 0;
  WeakNodePtr node{AnyNodePtr()};
};

thread_local std::array<Power, 32> powers;
thread_local size_t next_power = 0;

// Of a sum or a product of which one operand alone needs a gradient: that operand.
std::optional<int> learning_operand(const Node* node) {
  if (node->next_edge(0).is_valid() == node->next_edge(1).is_valid()) return std::nullopt;
  return node->next_edge(0).is_valid() ? 0 : 1;
}

bool is_same_memory(const Tensor& a, const Tensor& b) {
  return a.defined() && b.defined() && a.is_alias_of(b) && a.storage_offset() == b.storage_offset() &&
         a.sizes() == b.sizes() && a.strides() == b.strides() && a.scalar_type() == b.scalar_type();
}

bool has_float(const at::Scalar& number) { return !c10::overflows<float>(number.toDouble()); }

// Whether the node's operator moves elements, as matmul does for bmm, and no more.
bool is_move(const Node* node) {
  return as<generated::UnsafeViewBackward0>(node) || as<generated::ViewBackward0>(node) ||
         as<generated::ReshapeAliasBackward0>(node) || as<generated::CloneBackward0>(node) ||
         as<generated::ExpandBackward0>(node) || as<generated::TransposeBackward0>(node) ||
         as<generated::PermuteBackward0>(node);
}

// The moves between a quotient and a value: the last first.
struct Moves {
  const Node* quotient = nullptr;
  std::vector<const Node*> nodes;
};

std::optional<Moves> moves_of(const Node* node) {
  Moves moves{node};
  while (is_move(moves.quotient)) {
    const Edge& edge = moves.quotient->next_edge(0);
    if (moves.nodes.size() == kMoves || !edge.is_valid() || edge.input_nr != 0) return std::nullopt;
    moves.nodes.push_back(std::exchange(moves.quotient, edge.function.get()));
  }
  if (moves.nodes.empty() || !as<generated::DivBackward0>(moves.quotient)) return std::nullopt;
  return moves;
}

using Move = std::function<Tensor(const Tensor&)>;

// What the node did, to give that size; which becomes the size of what it was given. Of a copy, whose layout no node keeps, the
// usual is assumed.
Move move_of(const Node* node, std::vector<int64_t>& size) {
  if (const auto* transpose = as<generated::TransposeBackward0>(node)) {
    const auto at = [&](int64_t dim) -> int64_t& { return size.at(c10::maybe_wrap_dim(dim, size.size())); };
    std::swap(at(transpose->dim0), at(transpose->dim1));
    return [a = transpose->dim0, b = transpose->dim1](const Tensor& x) { return x.transpose(a, b); };
  }
  if (const auto* permute = as<generated::PermuteBackward0>(node)) {
    std::vector<int64_t> before(size.size());
    for (size_t i = 0; i < size.size(); ++i) {
      before.at(c10::maybe_wrap_dim(permute->dims.at(i), size.size())) = size[i];
    }
    size = std::move(before);
    return [dims = permute->dims](const Tensor& x) { return x.permute(dims); };
  }
  const auto resized = [&](const auto* of, auto move) -> Move {
    const auto before = c10::asIntArrayRefSlowOpt(of->self_sym_sizes);
    if (!before) return {};
    return [move, to = std::exchange(size, before->vec())](const Tensor& x) { return move(x, to); };
  };
  const auto reshape = [](const Tensor& x, at::IntArrayRef to) { return x.reshape(to); };
  if (const auto* view = as<generated::ViewBackward0>(node)) return resized(view, reshape);
  if (const auto* view = as<generated::UnsafeViewBackward0>(node)) return resized(view, reshape);
  if (const auto* view = as<generated::ReshapeAliasBackward0>(node)) return resized(view, reshape);
  if (const auto* expand = as<generated::ExpandBackward0>(node)) {
    return resized(expand, [](const Tensor& x, at::IntArrayRef to) { return x.expand(to); });
  }
  return [](const Tensor& x) { return x.contiguous(); };
}

template <class F>
Formula then(Formula x, F f) {
  if (!x) return {};
  return [x = std::move(x), f](at::TensorList kept) { return f(x(kept)); };
}

template <class F>
Formula of_both(Formula x, Formula y, F f) {
  if (!x || !y) return {};
  return [x = std::move(x), y = std::move(y), f](at::TensorList kept) { return f(x(kept), y(kept)); };
}

class Reader {
 public:
  Reader(const Tensor& beside, bool watched, bool has_data) : beside_(beside), watched_(watched), has_data_(has_data) {
    if (beside.defined()) beside_edge_ = torch::autograd::impl::gradient_edge(beside);
  }

  std::shared_ptr<Recipe> recipe_for(const Tensor& value) {
    dtype_ = value.scalar_type();
    Formula formula = read(value.grad_fn().get(), kDeepest);
    if (!formula) return nullptr;
    std::vector<int64_t> size;
    for (const Tensor& tensor : kept_) {
      if (is_same_memory(tensor, value)) return nullptr;  // as in x * x: a formula that reads it saves nothing
      size = at::infer_size(size, tensor.sizes());
    }
    return value.sizes() == size ? formula_of(kept_, std::move(formula), has_data_) : nullptr;
  }

  std::shared_ptr<Recipe> recipe_for_moved(const Tensor& value) {
    dtype_ = value.scalar_type();
    const auto moves = moves_of(value.grad_fn().get());
    if (!moves) return nullptr;
    const auto& quotient = static_cast<const generated::DivBackward0&>(*moves->quotient);
    Formula formula = of_both(saved(&quotient, quotient.self_), saved(&quotient, quotient.other_),
                              [](const Tensor& x, const Tensor& y) { return at::div(x, y); });
    if (!formula || kept_.size() != 2) return nullptr;
    std::vector<int64_t> size = value.sizes().vec();
    std::vector<Move> steps;
    for (const Node* node : moves->nodes) {
      steps.push_back(move_of(node, size));
      if (!steps.back()) return nullptr;
    }
    if (size != at::infer_size(kept_[0].sizes(), kept_[1].sizes())) return nullptr;
    std::reverse(steps.begin(), steps.end());
    return formula_of(kept_,
                      then(std::move(formula),
                           [steps](Tensor x) {
                             for (const Move& move : steps) x = move(x);
                             return x;
                           }),
                      has_data_);
  }

 private:
  Formula read(Node* node, int left) {
    if (left == 0) return {};
    const auto operand = [&](int i) { return read(node->next_edge(i), left - 1); };
    // A factor is kept for the other's gradient.
    const auto factor = [&](int i, const SavedVariable& variable) {
      return node->next_edge(1 - i).is_valid() ? saved(node, variable) : operand(i);
    };
    // Tanh or erf takes half of the time of a GELU that is written out: on the way, a formula starts from a result.
    SavedVariable* const result = left < kDeepest ? saved_result(node) : nullptr;
    if (const Tensor found = result ? kept_in(node, *result, pointer_to(*node)) : Tensor(); found.defined()) {
      return start(found);
    }
    if (auto* erf = as<generated::ErfBackward0>(node)) {
      let_operand_go(erf);
      return {};
    }
    if (as<generated::SigmoidBackward0>(node)) {
      return then(operand(0), [](const Tensor& x) { return at::sigmoid(x); });
    }
    if (as<generated::TanhBackward0>(node)) {
      return then(operand(0), [](const Tensor& x) { return at::tanh(x); });
    }
    if (const auto* softplus = as<generated::SoftplusBackward0>(node)) {
      return then(saved(node, softplus->self_), [beta = softplus->beta, threshold = softplus->threshold](
                                                    const Tensor& x) { return at::softplus(x, beta, threshold); });
    }
    if (const auto* power = as<generated::PowBackward0>(node)) {
      return then(saved(node, power->self_),
                  [exponent = power->exponent](const Tensor& x) { return at::pow(x, exponent); });
    }
    if (const auto* product = as<generated::MulBackward0>(node)) {
      return of_both(factor(0, product->self_), factor(1, product->other_),
                     [](const Tensor& x, const Tensor& y) { return at::mul(x, y); });
    }
    if (const auto* quotient = as<generated::DivBackward0>(node)) {
      return of_both(factor(0, quotient->self_), saved(node, quotient->other_),
                     [](const Tensor& x, const Tensor& y) { return at::div(x, y); });
    }
    if (const auto* sum = as<generated::AddBackward0>(node)) {
      return of_both(operand(0), addend(node, left),
                     [alpha = sum->alpha](const Tensor& x, const Tensor& y) { return at::add(x, y, alpha); });
    }
    if (const auto* difference = as<generated::SubBackward0>(node)) {
      return of_both(operand(0), operand(1),
                     [alpha = difference->alpha](const Tensor& x, const Tensor& y) { return at::sub(x, y, alpha); });
    }
    // As losses of torch's expand their operands, most often to the size that they have.
    if (as<generated::ExpandBackward0>(node)) return operand(0);
    return {};
  }

  Formula read(const Edge& edge, int left) {
    if (!edge.is_valid()) return {};
    if (beside_.defined() && edge == beside_edge_) return start(beside_);
    if (const Tensor tensor = kept_by_power(edge); tensor.defined()) return start(tensor);
    if (Formula divided = of_half(edge)) return divided;
    return edge.input_nr == 0 ? read(edge.function.get(), left) : Formula();
  }

  Formula addend(const Node* sum, int left) {
    if (sum->next_edge(1).is_valid()) return read(sum->next_edge(1), left - 1);
    const auto value = number_added(sum);
    return value ? as_number(*value, value->type()) : Formula();
  }

  // Where `beside` is the edge's tensor times a power of two, dividing it by that gives all bits again.
  Formula of_half(const Edge& edge) {
    const auto* product = as<generated::MulBackward0>(beside_edge_.function.get());
    if (!product || product->next_edge(0) != edge || product->next_edge(1).is_valid()) return {};
    const Tensor factor = kept_in(product, product->other_);
    if (!factor.defined() || factor.dim() != 0) return {};
    const auto number = number_in(factor);
    int exponent;
    if (!number || std::abs(std::frexp(number->toDouble(), &exponent)) != 0.5) return {};
    return of_both(start(beside_), as_number(*number, number->type()),
                   [](const Tensor& x, const Tensor& by) { return at::div(x, by); });
  }

  Tensor kept_by_power(const Edge& edge) const {
    for (const Power& power : powers) {
      if (power.operand != edge.function.get() || power.nr != edge.input_nr) continue;
      const auto node = power.node.lock();
      const auto* found = as<generated::PowBackward0>(node.get());
      if (!found || found->next_edge(0) != edge) continue;
      if (const Tensor tensor = kept_in(found, found->self_); tensor.defined()) return tensor;
    }
    return {};
  }

  // Undefined where it is not the tensor itself that the node keeps.
  Tensor kept_in(const Node* node, const SavedVariable& variable, AnyNodePtr made_it = {}) const {
    const NodeLock lock(*node);
    const bool is_kept = !variable.has_hooks() || (watched_ && !keeps_recipe(node));
    return is_kept ? variable.unpack(std::move(made_it)) : Tensor();
  }

  Formula saved(const Node* node, const SavedVariable& variable) { return start(kept_in(node, variable)); }

  // Erf keeps its operand, which is a cheap formula where it is a multiple of what a product keeps.
  void let_operand_go(generated::ErfBackward0* erf) {
    const Tensor operand = beside_.defined() ? kept_in(erf, erf->self_) : Tensor();
    if (!operand.defined() || operand.output_nr() != 0 || is_same_memory(operand, beside_)) return;
    const auto recipe = Reader(beside_, watched_, has_data_).recipe_for(operand);
    if (!recipe || (has_data_ && !recipe->gives(operand))) return;
    recipe->hold();
    let_go(erf, erf->self_, /*is_result=*/false, operand, recipe, watched_);
  }

  // As torch's operators take it, and no tensor, whose memory would count. In the dtype to which they would convert it each
  // time; in low precision they compute with it as it is. A number that has no float is infinite to them.
  Formula as_number(const at::Scalar& value, at::ScalarType dtype) const {
    if (dtype_ == at::kFloat || dtype_ == at::kDouble) dtype = dtype_;
    if (dtype == at::kFloat && !has_float(value)) return {};
    return [=](at::TensorList) { return at::detail::scalar_tensor_static(value, dtype, at::kCPU); };
  }

  Formula start(const Tensor& tensor) {
    if (!tensor.defined()) return {};
    if (tensor.dim() == 0) {
      const auto value = number_in(tensor);
      if (!value && has_data_) return {};
      return as_number(value.value_or(1), tensor.scalar_type());
    }
    if (tensor.scalar_type() != dtype_) return {};
    auto found =
        std::find_if(kept_.begin(), kept_.end(), [&](const Tensor& other) { return is_same_memory(other, tensor); });
    if (found == kept_.end()) found = kept_.insert(found, tensor);
    return [i = found - kept_.begin()](at::TensorList kept) { return kept[i]; };
  }

  const Tensor beside_;
  Edge beside_edge_;
  const bool watched_, has_data_;
  at::ScalarType dtype_ = at::kFloat;
  std::vector<Tensor> kept_;
};

}  // namespace

std::optional<at::Scalar> number_in(const Tensor& tensor) {
  if (!is_in_memory(tensor)) return std::nullopt;
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return *tensor.const_data_ptr<double>();
    case at::kFloat:
      return *tensor.const_data_ptr<float>();
    case at::kLong:
      return *tensor.const_data_ptr<int64_t>();
    default:
      return std::nullopt;
  }
}

bool makes_formula(const Node* node) {
  if (as<generated::MulBackward0>(node)) return learning_operand(node).has_value();
  if (as<generated::AddBackward0>(node)) return learning_operand(node) == 0 && number_added(node);
  return as<generated::SubBackward0>(node) || as<generated::DivBackward0>(node) ||
         as<generated::SigmoidBackward0>(node) || as<generated::TanhBackward0>(node) ||
         as<generated::ExpandBackward0>(node);
}

bool makes_moved_quotient(const Node* node) { return moves_of(node).has_value(); }

SavedVariable* saved_result(Node* node) {
  if (auto* sigmoid = as<generated::SigmoidBackward0>(node)) return &sigmoid->result_;
  auto* const tanh = as<generated::TanhBackward0>(node);
  return tanh ? &tanh->result_ : nullptr;
}

std::shared_ptr<Recipe> own_sigmoid_for(const Tensor& value, const Tensor& beside) {
  const auto* const sigmoid = as<generated::SigmoidBackward0>(value.grad_fn().get());
  if (!sigmoid || !beside.defined() || beside.scalar_type() != at::kFloat || value.scalar_type() != at::kFloat) {
    return nullptr;
  }
  const Edge start = torch::autograd::impl::gradient_edge(beside), &operand = sigmoid->next_edge(0);
  cpu::Sigmoid f;
  if (operand != start) {
    const auto* const product = as<generated::MulBackward0>(operand.function.get());
    if (!product || operand.input_nr != 0 || learning_operand(product) != 0 || product->next_edge(0) != start) {
      return nullptr;
    }
    const NodeLock lock(*product);
    if (product->other_.has_hooks()) return nullptr;
    const Tensor factor = product->other_.unpack();
    const auto number = factor.dim() == 0 ? number_in(factor) : std::nullopt;
    if (!number || !has_float(*number)) return nullptr;
    f.factor = number->toFloat();
  }
  return is_same_memory(beside, value) ? nullptr : function_of(beside, {.own = f}, /*has_data=*/true);
}

std::shared_ptr<Recipe> formula_for(const Tensor& value, const Tensor& beside, bool watched, bool has_data) {
  return Reader(beside, watched, has_data).recipe_for(value);
}

std::shared_ptr<Recipe> moved_quotient_for(const Tensor& value, bool watched, bool has_data) {
  return Reader(Tensor(), watched, has_data).recipe_for_moved(value);
}

void note_power(const Tensor& result) {
  const AnyNodePtr& node = result.grad_fn();
  if (!as<generated::PowBackward0>(node.get())) return;
  const Edge& operand = node->next_edge(0);
  // From torch 2.13 on a node that saved a leaf by hooks holds it until there is no pointer left, not even a weak one.
  if (as<torch::autograd::AccumulateGrad>(operand.function.get())) return;
  powers[next_power++ % powers.size()] = {operand.function.get(), operand.input_nr, WeakNodePtr(node)};
}

}  // namespace freezekit::chain
