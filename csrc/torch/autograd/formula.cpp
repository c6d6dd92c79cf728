#include "torch/autograd/formula.h"

#include <ATen/ops/zeros_like.h>

namespace freezekit {
namespace {

using torch::autograd::edge_list;

// The gradient itself, as a function of what it is linked to as well; that edge by edge receives zeros or nothing.
struct LinkFormula {
  bool zeros = false, lasting = false;

  auto fields() { return std::tie(zeros, lasting); }
  Link link() const { return {}; }

  variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const {
    variable_list result(wanted.size());
    if (wanted[0]) result[0] = grad;
    for (size_t i = 1; i < wanted.size() && zeros; ++i) {
      if (wanted[i]) result[i] = at::zeros_like(grad);
    }
    return result;
  }
};

class LinkNode : public FormulaNode<LinkFormula> {
 public:
  using FormulaNode::FormulaNode;

  void release_variables() override {}  // stock has no such node to release

  variable_list apply(variable_list&& grads) override {
    variable_list result = FormulaNode::apply(std::move(grads));
    if (formula_.lasting && result[0].defined() && c10::GradMode::is_enabled()) {
      result[0] = linked(result[0], {next_edges().begin() + 1, next_edges().end()}, formula_.zeros, formula_.lasting);
    }
    return result;
  }
};

}  // namespace

Tensor linked(const Tensor& gradient, const edge_list& to, bool zeros, bool lasting) {
  // Of the vmap behind is_grads_batched: its tensors have no history of their own, what they hold has.
  if (gradient.key_set().has(c10::DispatchKey::Batched)) return gradient;
  edge_list edges = {torch::autograd::impl::gradient_edge(gradient)};
  edges.insert(edges.end(), to.begin(), to.end());
  auto node = make_node<LinkNode>("FreezekitLinkBackward", LinkFormula{zeros, lasting});
  node->set_next_edges(std::move(edges));
  Tensor result = gradient.detach();
  torch::autograd::set_history(result, node);
  return result;
}

void BackwardNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (KeptTensor& kept : kept_) kept.variable.reset_data();
  is_released_ = true;
}

void BackwardNode::check_unreleased() const { TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE); }

Wanted BackwardNode::wanted() const {
  Wanted result(num_outputs());
  for (size_t i = 0; i < num_outputs(); ++i) result[i] = task_should_compute_output(i);
  return result;
}

void BackwardNode::add_links(const Link& link, variable_list& gradients) {
  if (link.to == Link::To::nothing) return;
  edge_list to;
  if (link.to == Link::To::result) {
    const AnyNodePtr view = view_.lock();
    to.emplace_back(view ? view : pointer_to<torch::autograd::Node>(*this), 0);
  } else {
    for (size_t i = 0; i < link.count; ++i) {
      if (next_edge(i).is_valid()) to.push_back(next_edge(i));
    }
  }
  if (to.empty()) return;
  for (Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = linked(gradient, to, link.zeros, link.lasting);
  }
}

}  // namespace freezekit
