#include "torch/frozen_conv2d/frozen_conv2d.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include "core/mask.h"
#include "torch/backends/aten.h"
#include "torch/common/checks.h"
#include "torch/common/computing.h"
#include "torch/bits/gate.h"
#include "torch/common/layout.h"
#include "torch/common/route.h"
#include "torch/backends/native.h"
#include "torch/backends/onednn.h"

namespace freezekit {
namespace {

using Activation = FrozenConv2d::Activation;
constexpr std::array<const char*, 3> kActivations = {"none", "relu", "relu6"};
constexpr float kRelu6End = 6;

Tensor or_none(const std::optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }
Tensor no_bits(const Tensor& like) { return at::empty({0}, like.options().dtype(at::kInt)); }

at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

bool result_is_channels_last(const FrozenConv2d& f, const Tensor& input, const Tensor& weight) {
  return f.channels_last.value_or(layout_of(input, weight) == at::MemoryFormat::ChannelsLast);
}

// conv2d's check but for the bias, which may be float32 beside a shorter dtype.
SizeVector check_operands(const Tensor& input, const Tensor& weight, const Tensor& bias, const Geometry& g) {
  const auto output = check_conv2d(input, weight, std::nullopt, g);
  if (!bias.defined()) return output;
  check_bias(bias.sym_sizes(), weight.sym_sizes());
  const bool shorter = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  if (!shorter || bias.scalar_type() != at::kFloat) check_same(input, "input", bias, "bias");
  TORCH_CHECK(bias.device() == input.device(), "bias is on ", bias.device(), ", input is on ", input.device());
  return output;
}

// What conv2d's check does not see: the residual, and dtypes that have no order.
void check_residual(const Tensor& input, const Tensor& residual, SymIntArrayRef output) {
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "input must be of a floating dtype, got ", input.scalar_type());
  if (!residual.defined()) return;
  check_same(input, "input", residual, "residual");
  TORCH_CHECK(residual.sym_sizes().equals(output), "residual must have the size of the output, ", output, ", got ",
              residual.sym_sizes());
}

Tensor activation_bits_(Tensor& y, std::string_view kind, double a, double b) {
  using Signature = Tensor(Tensor&, std::string_view, double, double, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("freezekit::activation_bits_", "").typed<Signature>();
  return op.call(y, kind, a, b, "auto");
}

// What is done besides the convolution, as measured choices tell problems apart; nothing while there are none.
std::string variant_of(std::initializer_list<std::pair<bool, const char*>> parts) {
  std::string text = "frozen";
  if (!choices::are_known()) return text;
  for (const auto& [present, name] : parts) {
    if (present) text += std::string("+") + name;
  }
  return text;
}

// By freezekit's kernels: one launch, bits in NHWC order.
Tensor frozen_by_kernels(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight, const Tensor& bias,
                         const Tensor& residual, const FrozenConv2d& f, const Tensor& bits, Backend backend) {
  native::Finish finish;
  finish.bias = bias, finish.residual = residual;
  finish.relu = f.has_mask();
  if (f.activation == Activation::relu6) finish.relu_end = kRelu6End;
  if (finish.relu && bits.numel() > 0) finish.mask_out = bits;
  return native::conv2d_epilogue(problem, input, weight, finish, f.geometry.with(backend));
}

// conv + bias + residual, by ATen or oneDNN, in the wanted layout.
Tensor affine_by_aten(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& residual,
                      bool channels_last, const Geometry& g) {
  const Tensor x = channels_last ? input.contiguous(at::MemoryFormat::ChannelsLast) : input;
  const Tensor r = residual.defined() ? residual.contiguous(format(channels_last)) : residual;
  if (channels_last && onednn::takes(x, weight, g)) return onednn::conv2d(x, weight, bias, r, g);
  const bool same = bias.defined() && bias.scalar_type() == x.scalar_type();
  Tensor y = aten::conv2d(x, weight, same ? std::make_optional(bias) : std::nullopt, g);
  y = y.contiguous(format(channels_last));
  if (bias.defined() && !same) y.add_(bias.view({1, -1, 1, 1}));
  return r.defined() ? y.add_(r) : y;
}

// Bits lie in the order of the result, unless the kernels were demanded: `auto` may choose them where both orders agree.
Backend choosable(Backend backend, bool channels_last) {
  return backend == Backend::automatic && !channels_last ? Backend::aten : backend;
}

std::tuple<Tensor, Tensor> frozen_kernel(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, std::string_view activation,
                                         SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                                         std::optional<bool> channels_last, bool keep_mask,
                                         std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  const Geometry& g = f.geometry;
  const Tensor r = or_none(residual);
  const auto output = check_operands(input, weight, or_none(bias), g);
  const Conv2dProblem problem = problem_of(input.sizes(), weight.sizes(), C10_AS_INTARRAYREF_SLOW(output), g);
  check_residual(input, r, output);
  const BelowAutogradAndAutocast below;
  const bool wanted = keep_mask && f.has_mask(), last = result_is_channels_last(f, input, weight);
  const Tensor b = or_none(bias);
  Tensor bits;
  const auto run = [&](Backend on) {
    if (on == Backend::aten) {
      Tensor y = affine_by_aten(input, weight, b, r, last, g);
      bits = f.has_mask() ? activate_(y, f.activation, wanted) : no_bits(y);
      return y;
    }
    bits = at::empty({wanted ? mask_words(problem.y_numel()) : 0}, input.options().dtype(at::kInt));
    return frozen_by_kernels(problem, input, weight, b, r, f, bits, on).contiguous(format(last));
  };
  const std::string variant = variant_of({{b.defined(), "bias"},
                                          {r.defined(), "residual"},
                                          {f.has_mask(), to_string(f.activation)},
                                          {wanted, "mask"}});
  const Tensor y = computed({Operator::fprop, problem, input, format(last), variant},
                                    choosable(g.backend, last), run);
  return {y, bits};
}

Tensor dgrad_by_aten(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Tensor& residual,
                     const Tensor& bits, bool channels_last, const Geometry& g) {
  Tensor dx;
  // In whatever layout grad_output comes, if the copy that this takes is no larger than the one of dx that it saves.
  const bool last = grad_output.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    (channels_last && grad_output.numel() <= c10::multiply_integers(C10_AS_INTARRAYREF_SLOW(input_size)));
  if (last && onednn::takes(grad_output, weight, g) && onednn::has_unit_stride_dgrad(weight, g)) {
    const Tensor dy = grad_output.contiguous(format(true));
    const bool adds = residual.defined() && channels_last;
    dx = onednn::dgrad(dy, weight, adds ? residual.contiguous(format(true)) : Tensor(), g);
    dx = dx.contiguous(format(channels_last));
    if (residual.defined() && !adds) dx.add_(residual);
  } else {
    dx = aten::dgrad(grad_output, weight, input_size, g).contiguous(format(channels_last));
    if (residual.defined()) dx.add_(residual);
  }
  if (bits.defined()) gate_inplace(dx, bits, {}, Backend::automatic);
  return dx;
}

Tensor frozen_dgrad_kernel(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                           const std::optional<Tensor>& residual, const std::optional<Tensor>& mask,
                           SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                           bool channels_last, std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(input_size);
  const Tensor r = or_none(residual), bits = or_none(mask);
  check_dgrad(grad_output, weight, input_size, g);
  const Conv2dProblem problem = problem_of(size, weight.sizes(), grad_output.sizes(), g);
  check_residual(grad_output, r, input_size);
  TORCH_CHECK(!bits.defined() || (bits.scalar_type() == at::kInt && bits.dim() == 1 &&
                                  bits.numel() == mask_words(problem.x_numel())),
              "mask must be one row of ", mask_words(problem.x_numel()), " int32 words, got ",
              bits.defined() ? bits.scalar_type() : at::kInt, " of size ", bits.defined() ? bits.sizes() : size);
  const BelowAutogradAndAutocast below;
  const auto run = [&](Backend on) {
    if (on == Backend::aten) return dgrad_by_aten(grad_output, weight, input_size, r, bits, channels_last, g);
    return native::dgrad_epilogue(problem, grad_output, weight, r, bits, g.with(on)).contiguous(format(channels_last));
  };
  const std::string variant = variant_of({{r.defined(), "residual"}, {bits.defined(), "mask"}});
  return computed({Operator::dgrad, problem, grad_output, format(channels_last), variant},
                          choosable(g.backend, channels_last), run);
}

std::tuple<Tensor, Tensor> frozen_meta(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& residual, std::string_view activation,
                                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                                       std::optional<bool> channels_last, bool keep_mask, std::string_view backend) {
  const FrozenConv2d f(activation, channels_last, Geometry(stride, padding, dilation, groups, backend));
  const auto size = check_operands(input, weight, or_none(bias), f.geometry);
  const Tensor r = or_none(residual);
  check_residual(input, r, size);
  const Tensor y =
      at::empty_symint(size, input.options(), format(result_is_channels_last(f, input, weight)));
  const c10::SymInt words = keep_mask && f.has_mask() ? (y.sym_numel() + 31) / 32 : c10::SymInt(0);
  return {y, at::empty_symint({words}, input.options().dtype(at::kInt))};
}

Tensor frozen_dgrad_meta(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                         const std::optional<Tensor>& residual, const std::optional<Tensor>&, SymIntArrayRef stride,
                         SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups, bool channels_last,
                         std::string_view backend) {
  const Geometry g(stride, padding, dilation, groups, backend);
  check_dgrad(grad_output, weight, input_size, g);
  const Tensor r = or_none(residual);
  check_residual(grad_output, r, input_size);
  return at::empty_symint(input_size, grad_output.options(), format(channels_last));
}

}  // namespace

FrozenConv2d::FrozenConv2d(std::string_view name, std::optional<bool> channels_last, Geometry g)
    : channels_last(channels_last), geometry(std::move(g)) {
  const auto found = std::find(kActivations.begin(), kActivations.end(), name);
  TORCH_CHECK_VALUE(found != kActivations.end(), "activation must be 'none', 'relu' or 'relu6', got '", name, "'");
  activation = static_cast<Activation>(found - kActivations.begin());
}

const char* to_string(Activation activation) { return kActivations[static_cast<size_t>(activation)]; }

Tensor activate_(Tensor& y, Activation activation, bool keep_mask) {
  const bool relu = activation == Activation::relu;
  if (keep_mask) return relu ? activation_bits_(y, "relu", 0, 0) : activation_bits_(y, "hardtanh", 0, kRelu6End);
  if (relu) {
    at::relu_(y);
  } else {
    at::hardtanh_(y, 0, kRelu6End);
  }
  return no_bits(y);
}

std::vector<c10::SymInt> dense_stride(SymIntArrayRef size, bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], c10::SymInt(1), size[1] * size[3], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], c10::SymInt(1)};
}

std::tuple<Tensor, Tensor> frozen_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, const FrozenConv2d& f,
                                         bool keep_mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("freezekit::frozen_conv2d", "").typed<FrozenConv2dSignature>();
  const Geometry& g = f.geometry;
  return op.call(input, weight, bias, residual, to_string(f.activation), g.stride, g.padding, g.dilation, g.groups,
                 f.channels_last, keep_mask, to_string(g.backend));
}

Tensor frozen_conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                           const Tensor& residual, const Tensor& bits, bool channels_last, const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("freezekit::frozen_conv2d_dgrad", "")
                             .typed<FrozenDgradSignature>();
  const auto optional = [](const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; };
  return op.call(grad_output, weight, input_size, optional(residual), optional(bits), g.stride, g.padding, g.dilation,
                 g.groups, channels_last, to_string(g.backend));
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "frozen_conv2d(Tensor input, Tensor weight, Tensor? bias=None, Tensor? residual=None, str activation=\"none\", "
      "SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, bool? channels_last=None, "
      "bool keep_mask=False, str backend=\"auto\") -> (Tensor, Tensor)",
      tags);
  m.def(
      "frozen_conv2d_dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, Tensor? residual=None, "
      "Tensor? mask=None, SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, "
      "bool channels_last=False, str backend=\"auto\") -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("frozen_conv2d", freezekit::frozen_kernel);
  m.impl("frozen_conv2d_dgrad", freezekit::frozen_dgrad_kernel);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("frozen_conv2d", freezekit::frozen_meta);
  m.impl("frozen_conv2d_dgrad", freezekit::frozen_dgrad_meta);
}
