#include "torch/chains/formulas.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <optional>
#include <typeinfo>
#include <utility>

#include "torch/autograd/node.h"

namespace freezekit::chain {
namespace {

namespace generated = torch::autograd::generated;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

constexpr int kDeepest = 5;            // nodes on the way to a tensor that is kept
constexpr int64_t kFewElements = 256;  // a recipe of its own weighs as much

template <class T>
std::weak_ptr<T> weak(const std::shared_ptr<T>& pointer) {
  return pointer;
}
template <class T>
c10::weak_intrusive_ptr<T> weak(const c10::intrusive_ptr<T>& pointer) {
  return c10::weak_intrusive_ptr<T>(pointer);
}

// The last powers. An edge to what one of them keeps is known by its numbers, and the node is asked whether it is there.
struct Power {
  const Node* operand_s = nullptr;
  uint32_t nr = 0;
  std::optional<decltype(weak(AnyNodePtr()))> node;
};

thread_local std::array<Power, 32> powers;
thread_local size_t next_power = 0;

template <class T>
const T* as(const Node* node) {
  return node && typeid(*node) == typeid(T) ? static_cast<const T*>(node) : nullptr;
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
  Reader(const Tensor& value, const Tensor& beside, bool watched, bool has_data)
      : dtype_(value.scalar_type()), beside_(beside), watched_(watched), has_data_(has_data) {
    if (beside.defined()) beside_edge_ = torch::autograd::impl::gradient_edge(beside);
  }

  Formula read(const Node* node, int left) {
    if (left == 0) return {};
    const auto operand = [&](int i) { return read(node->next_edge(i), left - 1); };
    // A factor is kept for the other's gradient.
    const auto factor = [&](int i, const SavedVariable& variable) {
      return node->next_edge(1 - i).is_valid() ? saved(node, variable) : operand(i);
    };
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
      return of_both(operand(0), operand(1),
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

  const std::vector<Tensor>& kept() const { return kept_; }

 private:
  Formula read(const Edge& edge, int left) {
    if (!edge.is_valid()) return {};
    if (beside_.defined() && edge == beside_edge_) return start(beside_);
    if (const Tensor tensor = kept_by_power(edge); tensor.defined()) return start(tensor);
    return edge.input_nr == 0 ? read(edge.function.get(), left) : Formula();
  }

  Tensor kept_by_power(const Edge& edge) const {
    for (const Power& power : powers) {
      if (power.operand_s != edge.function.get() || power.nr != edge.input_nr) continue;
      const auto node = power.node->lock();
      const auto* found = as<generated::PowBackward0>(node.get());
      if (found && found->next_edge(0) == edge && is_kept(found, found->self_)) return found->self_.unpack();
    }
    return {};
  }

  bool is_kept(const Node* node, const SavedVariable& variable) const {
    return !variable.has_hooks() || (watched_ && !keeps_recipe(node));
  }

  Formula saved(const Node* node, const SavedVariable& variable) {
    return is_kept(node, variable) ? start(variable.unpack()) : Formula();
  }

  Formula start(const Tensor& tensor) {
    if (!tensor.defined()) return {};
    if (tensor.dim() == 0) {
      return [number = has_data_ ? copy_of_number(tensor) : tensor](at::TensorList) { return number; };
    }
    if (tensor.scalar_type() != dtype_) return {};
    auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Tensor& other) { return other.is_same(tensor); });
    if (found == kept_.end()) found = kept_.insert(found, tensor);
    return [i = found - kept_.begin()](at::TensorList kept) { return kept[i]; };
  }

  // In the dtype to which torch's operators would convert it each time. In low precision they compute with it as it is.
  Tensor copy_of_number(const Tensor& number) const {
    const bool is_converted = dtype_ == at::kFloat || dtype_ == at::kDouble;
    const at::AutoDispatchBelowADInplaceOrView below;
    return number.to(is_converted ? dtype_ : number.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  }

  const at::ScalarType dtype_;
  const Tensor beside_;
  Edge beside_edge_;
  const bool watched_, has_data_;
  std::vector<Tensor> kept_;
};

}  // namespace

bool makes_formula(const Node* node) {
  return as<generated::SubBackward0>(node) || as<generated::DivBackward0>(node) ||
         as<generated::SigmoidBackward0>(node) || as<generated::TanhBackward0>(node) ||
         as<generated::ExpandBackward0>(node);
}

SavedVariable* saved_result(Node* node) {
  if (as<generated::SigmoidBackward0>(node)) return &static_cast<generated::SigmoidBackward0*>(node)->result_;
  if (as<generated::TanhBackward0>(node)) return &static_cast<generated::TanhBackward0*>(node)->result_;
  return nullptr;
}

std::shared_ptr<Recipe> formula_for(const Tensor& value, const Tensor& beside, bool watched, bool has_data) {
  if (value.numel() < kFewElements) return nullptr;
  Reader reader(value, beside, watched, has_data);
  Formula formula = reader.read(value.grad_fn().get(), kDeepest);
  if (!formula) return nullptr;
  std::vector<int64_t> size;
  for (const Tensor& tensor : reader.kept()) size = at::infer_size(size, tensor.sizes());
  return value.sizes() == size ? formula_of(reader.kept(), std::move(formula), has_data) : nullptr;
}

void note_power(const Tensor& result) {
  const AnyNodePtr& node = result.grad_fn();
  if (!as<generated::PowBackward0>(node.get())) return;
  const Edge& operand = node->next_edge(0);
  powers[next_power++ % powers.size()] = {operand.function.get(), operand.input_nr, weak(node)};
}

}  // namespace freezekit::chain
