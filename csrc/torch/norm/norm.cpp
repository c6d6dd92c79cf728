// Normalisations that keep what their gradients read, and no more.
//
//   batch_norm(x, w, b, mean, var, eps)   by given statistics: y = (x - mean) * s + b with s = w / sqrt(var + eps)
//   layer_norm, group_norm                by the statistics of x itself
//
//   learns              needs dx   batch_norm keeps    layer_norm, group_norm keep
//   weight              any        as torch            as torch
//   bias or nothing     yes        w and var, by name  as torch: dx reads x and its statistics
//   bias                no         nothing             nothing
//
// "By name": parameters and buffers that are there anyway, not copies.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/layer_norm.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// Sum over all dimensions but `dim`.
Tensor sum_but(const Tensor& tensor, int64_t dim) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i != dim) dims.push_back(i);
  }
  return tensor.sum(dims);
}

Tensor by_statistics(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                     const Tensor& var, double eps) {
  return at::batch_norm(input, weight, bias, mean, var, /*training=*/false, /*momentum=*/0, eps,
                        at::globalContext().userEnabledCuDNN());
}

// values: eps, the dtype of the bias. kept: var and, where there is one, the weight; nothing where dx is never asked.
variable_list batch_norm_backward(const Tensor& grad, const variable_list& kept, const Settings& settings,
                                  const std::vector<bool>& wanted) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  variable_list result(wanted.size());
  if (wanted[0]) {
    Tensor scale = at::rsqrt(kept[0] + settings.values[0].toDouble());
    if (kept.size() > 1) scale = scale * kept[1];
    std::vector<int64_t> along(grad.dim(), 1);
    along[1] = -1;
    // Parameters may be of a wider dtype than activations; the product is rounded once.
    result[0] = (grad * scale.view(along)).to(grad.scalar_type());
  }
  if (wanted.size() > 1 && wanted[1]) result[1] = sum_but(grad, 1).to(settings.values[1].toScalarType());
  return result;
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                  const Tensor& var, double eps) {
  const Tensor w = or_undefined(weight), b = or_undefined(bias);
  const auto is_torch_s = [](const Tensor& t) { return t.defined() && (needs_aten(t) || t.requires_grad()); };
  if (!torch::autograd::compute_requires_grad(input, b) || needs_aten(input) || input.dim() < 2 || is_torch_s(w) ||
      is_torch_s(mean) || is_torch_s(var) || (b.defined() && needs_aten(b))) {
    return by_statistics(input, weight, bias, mean, var, eps);
  }
  Settings settings{{eps, b.defined() ? b.scalar_type() : input.scalar_type()}, {}};
  const auto node = b.defined()
                        ? formula_node<batch_norm_backward>("FreezekitBatchNormBackward", std::move(settings), input, b)
                        : formula_node<batch_norm_backward>("FreezekitBatchNormBackward", std::move(settings), input);
  if (input.requires_grad()) node->keep(w.defined() ? variable_list{var, w} : variable_list{var});
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return by_statistics(input, weight, bias, mean, var, eps);
  }();
  torch::autograd::set_history(result, node);
  return result;
}

Tensor layer_norm_aten(const Tensor& input, SymIntArrayRef shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps) {
  return at::layer_norm_symint(input, shape, weight, bias, eps);
}

Tensor group_norm_aten(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                       double eps) {
  return at::group_norm(input, groups, weight, bias, eps);
}

// Where the bias alone learns its gradient is a sum of the output's, and that reads no activation.
bool is_for_bias_alone(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return bias.defined() && torch::autograd::compute_requires_grad(bias) && !input.requires_grad() &&
         !(weight.defined() && weight.requires_grad()) && !needs_aten(input) && !needs_aten(bias) &&
         !(weight.defined() && needs_aten(weight));
}

// sizes: the bias's. It lies along the last dimensions of grad (LayerNorm) or along dimension 1 (GroupNorm).
variable_list layer_norm_bias_gradient(const Tensor& grad, const variable_list&, const Settings& settings,
                                       const std::vector<bool>& wanted) {
  if (!wanted[0]) return {Tensor()};
  return {grad.sum_to_size_symint(settings.sizes[0]).to(settings.values[0].toScalarType())};
}

variable_list group_norm_bias_gradient(const Tensor& grad, const variable_list&, const Settings& settings,
                                       const std::vector<bool>& wanted) {
  if (!wanted[0]) return {Tensor()};
  return {sum_but(grad, 1).to(settings.values[0].toScalarType())};
}

template <Formula kFormula, class Compute>
Tensor record_bias(const char* name, const Tensor& bias, Compute compute) {
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }();
  torch::autograd::set_history(
      result, formula_node<kFormula>(name, Settings{{bias.scalar_type()}, {owned(bias.sym_sizes())}}, bias));
  return result;
}

Tensor layer_norm(const Tensor& input, SymIntArrayRef shape, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps) {
  const auto compute = [&] { return layer_norm_aten(input, shape, weight, bias, eps); };
  if (!is_for_bias_alone(input, or_undefined(weight), or_undefined(bias))) return compute();
  return record_bias<layer_norm_bias_gradient>("FreezekitLayerNormBackward", *bias, compute);
}

Tensor group_norm(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps) {
  const auto compute = [&] { return group_norm_aten(input, groups, weight, bias, eps); };
  if (!is_for_bias_alone(input, or_undefined(weight), or_undefined(bias))) return compute();
  return record_bias<group_norm_bias_gradient>("FreezekitGroupNormBackward", *bias, compute);
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps=1e-5)"
      " -> Tensor",
      tags);
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-5)"
      " -> Tensor",
      tags);
  m.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> Tensor",
      tags);
}
#define FREEZEKIT_ATEN_KERNELS(m)               \
  m.impl("batch_norm", freezekit::by_statistics); \
  m.impl("layer_norm", freezekit::layer_norm_aten); \
  m.impl("group_norm", freezekit::group_norm_aten)

TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("batch_norm", freezekit::batch_norm);
  m.impl("layer_norm", freezekit::layer_norm);
  m.impl("group_norm", freezekit::group_norm);
}
