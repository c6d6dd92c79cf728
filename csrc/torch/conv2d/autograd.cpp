// The entries of all three operators, and their backward pass. It is one formula, since each operator is a derivative of
// the same trilinear form.
//
// A node keeps an operand only if some *other* operand needs a gradient. So a layer with a frozen weight keeps no input,
// and a layer of which only the bias learns keeps nothing.
#include "torch/conv2d/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/backends/aten.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/operators.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

enum class Role : int8_t { input, weight, output };

using Sizes = std::array<c10::SymInt, 4>;

// The gradients of what `computes` is: of both operands of the trilinear form, whose roles are `first` and `second` and
// which are kept in this order, and of the bias.
struct TrilinearGradients {
  Geometry geometry;
  Sizes input_size, weight_size;
  Role computes, first, second;
  at::MemoryFormat layout = at::MemoryFormat::Contiguous;  // of the result, so of its gradient, in whatever it arrives

  auto fields() {
    Geometry& g = geometry;
    return std::tie(g.stride, g.padding, g.dilation, g.groups, g.backend, input_size, weight_size, computes, first,
                    second, layout);
  }

  // Of the layer, not of the operators that its gradients are.
  Link link() const { return computes == Role::output ? Link{Link::To::operands, /*count=*/2} : Link{}; }

  variable_list gradients(const Tensor& dy, Kept kept, const Wanted& wanted) const {
    constexpr size_t bias = 2;
    variable_list result(wanted.size());
    const Backend backend = geometry.backend;
    const Tensor grad = wanted[0] || wanted[1] ? laid_out(dy) : dy;
    // Once each: checkpoints refuse a second time.
    const std::array<Tensor, 2> operands = {wanted[1] ? kept(0) : Tensor(), wanted[0] ? kept(1) : Tensor()};
    const auto& [input, weight] = operands;
    if (computes == Role::output && wanted[0] && wanted[1] && is_left_to_aten(backend, grad) &&
        reaches_kernel(grad, input, weight)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto [dx, dw, db] = aten::gradients(grad, input, weight, wanted[bias], aten::convolution_of(geometry));
      return {finish(dx, layout), finish(dw, layout), db};
    }
    if (wanted[0]) result[0] = derivative(first, second, operands[1], grad);
    if (wanted[1]) result[1] = derivative(second, first, operands[0], grad);
    if (wanted.size() > bias && wanted[bias]) {
      result[bias] = is_own(backend) ? conv2d_bias_grad(grad, backend) : dy.sum({0, 2, 3});
    }
    return result;
  }

 private:
  // Freezekit's own kernels read NHWC: what is in another layout is laid out once, for all gradients.
  Tensor laid_out(const Tensor& grad) const {
    return in_layout(grad, is_own(geometry.backend) ? at::MemoryFormat::ChannelsLast : layout);
  }
  Tensor finished(const Tensor& gradient) const {
    return is_own(geometry.backend) ? in_layout(gradient, layout) : gradient;
  }

  // The derivative of the form with respect to `missing`, on the gradient and on the operand of the role that is left.
  Tensor derivative(Role missing, Role left, const Tensor& other, const Tensor& grad) const {
    std::array<const Tensor*, 3> operand = {};  // no copies: each would count a reference up and down
    operand[static_cast<size_t>(computes)] = &grad;
    operand[static_cast<size_t>(left)] = &other;
    const auto [x, w, y] = operand;
    if (missing == Role::input) return conv2d_dgrad(*y, *w, input_size, geometry, layout);
    return finished(missing == Role::output ? conv2d(*x, *w, std::nullopt, geometry)
                                            : conv2d_wgrad(*y, *x, weight_size, geometry));
  }
};

// Their number was checked.
Sizes sizes_of(SymIntArrayRef sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }

template <class Compute, class... Bias>
Tensor record(const char* name, TrilinearGradients&& formula, const Tensor& first, const Tensor& second,
              const Compute& compute, const Bias&... bias) {
  formula.layout = layout_of(first, second);
  const auto node = formula_node(name, std::move(formula), first, second, bias...);
  if (node) node->keep(second.requires_grad() ? first : Tensor(), first.requires_grad() ? second : Tensor());
  return recorded(node, compute);
}

}  // namespace

Tensor record_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Geometry& g,
                     c10::function_ref<Tensor()> compute) {
  return record("FreezekitConv2dBackward",
                {g, sizes_of(input.sym_sizes()), sizes_of(weight.sym_sizes()), Role::output, Role::input, Role::weight},
                input, weight, compute, bias);
}

Tensor record_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  const Tensor& b = tensor_of(bias);
  const bool unseen = is_unseen(input, weight, b.defined() ? b : weight);  // an undefined one has keys of its own
  if (!unseen || !is_sound_conv2d(input, weight, b, g)) check_conv2d(input, weight, bias, g);
  const bool is_left_to_torch = is_empty(input) && !is_own(g.backend), by_aten = is_left_to_aten(g.backend, input);
  if (is_left_to_torch || route(Op::conv2d, g.backend, input, weight, b).computer == Computer::formula) {
    return aten::conv2d(input, weight, bias, g);
  }
  return record_conv2d(input, weight, b, g, [&]() -> Tensor {
    // A mode of the user's, as for selective checkpointing, is to meet the operator whose name it knows.
    if (!by_aten || !(unseen || c10::impl::TorchDispatchModeTLS::any_modes_set(/*skip_infra_modes=*/true))) {
      return conv2d(input, weight, bias, g);
    }
    const auto convolution = aten::convolution_of(g);
    const Tensor y = at::convolution_symint(input, weight, bias, g.stride, g.padding, g.dilation, /*transposed=*/false,
                                            convolution.output_padding, g.groups);
    return finish(y, layout_of(input, weight));
  });
}

namespace {

Tensor dgrad_entry(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  check_dgrad(grad_output, weight, input_size, g);
  if (route(Op::conv2d_dgrad, g.backend, grad_output, weight).computer == Computer::formula) {
    return aten::dgrad(grad_output, weight, input_size, g);
  }
  return record("FreezekitConv2dDgradBackward",
                {g, sizes_of(input_size), sizes_of(weight.sym_sizes()), Role::input, Role::output, Role::weight},
                grad_output, weight, [&] { return conv2d_dgrad(grad_output, weight, input_size, g); });
}

Tensor wgrad_entry(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  check_wgrad(grad_output, input, weight_size, g);
  if (route(Op::conv2d_wgrad, g.backend, grad_output, input).computer == Computer::formula) {
    return aten::wgrad(grad_output, input, weight_size, g);
  }
  return record("FreezekitConv2dWgradBackward",
                {g, sizes_of(input.sym_sizes()), sizes_of(weight_size), Role::weight, Role::output, Role::input},
                grad_output, input, [&] { return conv2d_wgrad(grad_output, input, weight_size, g); });
}

void register_entries(torch::Library& m) {
  m.impl("conv2d", Conv2dOperator::kernel<record_conv2d>);
  m.impl("conv2d_dgrad", Conv2dGradOperator::kernel<dgrad_entry>);
  m.impl("conv2d_wgrad", Conv2dGradOperator::kernel<wgrad_entry>);
}

}  // namespace

// Under vmap the operators are ATen's, which have batching rules: that, too, the entries see in their tensors.
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { register_entries(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { register_entries(m); }

}  // namespace freezekit
