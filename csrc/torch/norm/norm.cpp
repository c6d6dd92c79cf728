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
#include "torch/norm/norm.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_batch_norm.h>
#include <torch/library.h>

#include <cmath>

#include "torch/autograd/formula.h"
#include "torch/backends/proof.h"
#include "torch/backends/route.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

// Sum over all dimensions but `dim`.
Tensor sum_but(const Tensor& tensor, int64_t dim) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i != dim) dims.push_back(i);
  }
  return tensor.sum(dims);
}

// What at::batch_norm checks before it calls native_batch_norm on a CPU.
bool are_per_channel(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                     const Tensor& var) {
  if (input.dim() < 2 || input.numel() == 0) return false;
  const auto fits = [channels = input.size(1)](const Tensor& tensor) { return tensor.numel() == channels; };
  return fits(mean) && fits(var) && (!weight || fits(*weight)) && (!bias || fits(*bias));
}

Tensor by_statistics(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                     const Tensor& var, double eps) {
  if (is_unseen(input) && are_per_channel(input, weight, bias, mean, var)) {
    return std::get<0>(at::native_batch_norm(input, weight, bias, mean, var, /*training=*/false, /*momentum=*/0, eps));
  }
  return at::batch_norm(input, weight, bias, mean, var, /*training=*/false, /*momentum=*/0, eps,
                        at::globalContext().userEnabledCuDNN());
}

// w / sqrt(var + eps), along dimension 1 of `dim`. Beside a tiny layer's product, operators for it take most of the time:
// of plain tensors it is one loop, which rounds as they do.
Tensor scale_of(const Tensor& var, const Tensor& weight, double eps, int64_t dim) {
  std::vector<int64_t> along(dim, 1);
  along[1] = -1;
  const auto is_plain = [&](const Tensor& tensor) {
    return is_plain_on_cpu(tensor) && tensor.scalar_type() == at::kFloat && tensor.is_contiguous();
  };
  if (c10::GradMode::is_enabled() || !is_plain(var) || (weight.defined() && !is_plain(weight))) {
    const Tensor scale = at::rsqrt(var + eps);
    return (weight.defined() ? scale * weight : scale).view(along);
  }
  along[1] = var.numel();
  const Tensor scale = empty_beside(var, c10::fromIntArrayRefSlow(along), at::MemoryFormat::Contiguous, at::kFloat);
  const float* v = var.const_data_ptr<float>();
  const float* w = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  float* to = scale.mutable_data_ptr<float>();
  for (int64_t i = 0; i < along[1]; ++i) {
    const float inverse = 1 / std::sqrt(v[i] + static_cast<float>(eps));
    to[i] = w ? inverse * w[i] : inverse;
  }
  return scale;
}

// grad * scale in grad's dtype and in the input's format. Parameters may be of a wider dtype than activations; the product
// is rounded once. The form with an output reads and writes once, whatever the dtypes and layouts are.
Tensor scaled(const Tensor& grad, const Tensor& scale, at::MemoryFormat format) {
  const bool has_tangents = has_tangent(grad) || has_tangent(scale);
  if (has_tangents || !proof::is_plain(grad) || !proof::is_plain(scale)) return (grad * scale).to(grad.scalar_type());
  if (c10::GradMode::is_enabled() || proof::is_watched()) {
    return finish((grad * scale).to(grad.scalar_type()), format);
  }
  Tensor out = empty_beside(grad, grad.sym_sizes(), format, grad.scalar_type());
  return at::mul_out(out, grad, scale);
}

// The format in which a tensor has no gaps; what it suggests where there is none.
at::MemoryFormat dense_format(const Tensor& tensor) {
  using at::MemoryFormat;
  for (const auto format : {MemoryFormat::Contiguous, MemoryFormat::ChannelsLast3d, MemoryFormat::ChannelsLast}) {
    if (tensor.is_contiguous(format)) return format;
  }
  return tensor.suggest_memory_format();
}

// How torch lays out dx. It has a kernel for tensors without gaps that suggest one format; of one channel, or a batch of
// one, that is not the format they are in.
struct FormatOfInput {
  FormatOfInput() = default;
  explicit FormatOfInput(const Tensor& x)
      : suggested(x.suggest_memory_format()), dense(proof::is_plain(x) ? dense_format(x) : suggested) {}

  at::MemoryFormat beside(const Tensor& dy) const {
    if (dense == suggested || !proof::is_plain(dy) || dy.suggest_memory_format() != suggested) return suggested;
    return dy.is_contiguous(dense_format(dy)) ? dense : suggested;
  }

  at::MemoryFormat suggested = at::MemoryFormat::Contiguous, dense = at::MemoryFormat::Contiguous;
};

// kept: var and, where there is one, the weight; nothing where dx is never asked for.
struct BatchNormGradients {
  double eps = 0;
  bool has_weight = false;
  at::ScalarType bias_dtype = at::kFloat;
  FormatOfInput format;

  auto fields() { return std::tie(eps, has_weight, bias_dtype, format.suggested, format.dense); }
  Link link() const { return {Link::To::operands}; }

  variable_list gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list result(wanted.size());
    if (wanted[0]) {
      const Tensor scale = scale_of(kept(0), has_weight ? kept(1) : Tensor(), eps, grad.dim());
      result[0] = scaled(grad, scale, format.beside(grad));
    }
    if (wanted[2]) result[2] = sum_but(grad, 1).to(bias_dtype);
    return result;
  }
};

}  // namespace

AnyNodePtr batch_norm_node(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& var,
                           double eps) {
  const at::ScalarType bias_dtype = bias.defined() ? bias.scalar_type() : input.scalar_type();
  BatchNormGradients gradients{eps, weight.defined(), bias_dtype, FormatOfInput(input)};
  const auto node = formula_node("FreezekitBatchNormBackward", std::move(gradients), input, weight, bias);
  if (input.requires_grad()) {
    weight.defined() ? node->keep(var, weight) : node->keep(var);
  }
  return node;
}

Tensor record_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& var, double eps) {
  const Tensor &w = tensor_of(weight), &b = tensor_of(bias);
  // While one of these learns, the formula reads the input, and torch keeps it.
  const bool reads_input = learns(w) || learns(mean) || learns(var);
  if (reads_input || input.dim() < 2 ||
      route(Op::batch_norm, Backend::automatic, input, w, b, mean, var).computer == Computer::formula) {
    return by_statistics(input, weight, bias, mean, var, eps);
  }
  return recorded(batch_norm_node(input, w, b, var, eps),
                  [&] { return by_statistics(input, weight, bias, mean, var, eps); });
}

namespace {

Tensor layer_norm_aten(const Tensor& input, SymIntArrayRef shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps) {
  return at::layer_norm_symint(input, shape, weight, bias, eps);
}

Tensor group_norm_aten(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                       double eps) {
  return at::group_norm(input, groups, weight, bias, eps);
}

bool keeps_nothing(Op op, const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return is_for_bias_alone(input, weight, bias) &&
         route(op, Backend::automatic, input, weight, bias).computer != Computer::formula;
}

// Torch's nodes have an edge each for input, weight and bias, whoever learns; so have these.
//
// The bias spans the last dimensions of grad (LayerNorm).
struct LayerNormBiasGradient {
  at::ScalarType dtype = at::kFloat;
  std::vector<c10::SymInt> size;

  auto fields() { return std::tie(dtype, size); }
  Link link() const { return {Link::To::operands, /*count=*/3}; }
  variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const {
    return {Tensor(), Tensor(), wanted[2] ? grad.sum_to_size_symint(size).to(dtype) : Tensor()};
  }
};

// The bias spans dimension 1 (GroupNorm).
struct GroupNormBiasGradient {
  at::ScalarType dtype = at::kFloat;

  auto fields() { return std::tie(dtype); }
  Link link() const { return {}; }
  variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const {
    return {Tensor(), Tensor(), wanted[2] ? sum_but(grad, 1).to(dtype) : Tensor()};
  }
};

}  // namespace

AnyNodePtr layer_norm_bias_node(const Tensor& bias) {
  return formula_node("FreezekitLayerNormBackward", LayerNormBiasGradient{bias.scalar_type(), owned(bias.sym_sizes())},
                      Tensor(), Tensor(), bias);
}

AnyNodePtr group_norm_bias_node(const Tensor& bias) {
  return formula_node("FreezekitGroupNormBackward", GroupNormBiasGradient{bias.scalar_type()}, Tensor(), Tensor(),
                      bias);
}

namespace {

Tensor layer_norm(const Tensor& input, SymIntArrayRef shape, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps) {
  const auto compute = [&] { return layer_norm_aten(input, shape, weight, bias, eps); };
  if (!keeps_nothing(Op::layer_norm, input, tensor_of(weight), tensor_of(bias))) return compute();
  return recorded(layer_norm_bias_node(*bias), compute);
}

Tensor group_norm(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps) {
  const auto compute = [&] { return group_norm_aten(input, groups, weight, bias, eps); };
  if (!keeps_nothing(Op::group_norm, input, tensor_of(weight), tensor_of(bias))) return compute();
  return recorded(group_norm_bias_node(*bias), compute);
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
  m.def("group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> Tensor",
        tags);
}
#define FREEZEKIT_ATEN_KERNELS(m)                   \
  m.impl("batch_norm", freezekit::by_statistics);   \
  m.impl("layer_norm", freezekit::layer_norm_aten); \
  m.impl("group_norm", freezekit::group_norm_aten)

TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("batch_norm", freezekit::record_batch_norm);
  m.impl("layer_norm", freezekit::layer_norm);
  m.impl("group_norm", freezekit::group_norm);
}
