#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include "core/mask.h"
#include "torch/backends/aten.h"
#include "torch/backends/few.h"
#include "torch/backends/native.h"
#include "torch/backends/proof.h"
#include "torch/backends/route.h"
#include "torch/backends/winograd.h"
#include "torch/bits/gate.h"
#include "torch/common/checks.h"
#include "torch/common/computing.h"
#include "torch/common/layout.h"
#include "torch/frozen_conv2d/finish.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"

namespace freezekit {
namespace {

using Activation = FrozenConv2d::Activation;
constexpr std::array<const char*, 3> kActivations = {"none", "relu", "relu6"};
constexpr auto kLast = at::MemoryFormat::ChannelsLast;

bool is_nchw_or_nhwc(const Tensor& tensor) { return tensor.is_contiguous() || tensor.is_contiguous(kLast); }

void check_norm(const FixedNormTensors& norm, const Tensor& weight) {
  const auto check = [&](const Tensor& tensor, const char* name) {
    if (!tensor.defined()) return;
    TORCH_CHECK(tensor.dim() == 1 && tensor.sym_size(0) == weight.sym_size(0), name, " must have size [",
                weight.sym_size(0), "], one value per output channel, got ", tensor.sym_sizes());
    check_floating(tensor, name);
    TORCH_CHECK(tensor.device() == weight.device(), name, " is on ", tensor.device(), ", weight is on ",
                weight.device());
  };
  check(norm.gamma, "norm_weight"), check(norm.beta, "norm_bias");
  check(norm.mean, "running_mean"), check(norm.var, "running_var");
  const bool any = norm.gamma.defined() || norm.beta.defined() || norm.mean.defined();
  TORCH_CHECK(norm.defined() || !any, "running_var must be given with the other tensors of a norm");
}

// conv2d's check but for the bias, which may be float32 beside a shorter dtype.
SizeVector check_operands(const FrozenOperands& o, const Geometry& g) {
  const auto output = check_conv2d(o.input, o.weight, std::nullopt, g);
  check_norm(o.norm, o.weight);
  if (!o.bias.defined()) return output;
  check_bias(o.bias.sym_sizes(), o.weight.sym_sizes());
  const bool shorter = o.input.scalar_type() == at::kBFloat16 || o.input.scalar_type() == at::kHalf;
  if (!shorter || o.bias.scalar_type() != at::kFloat) check_same(o.input, "input", o.bias, "bias");
  TORCH_CHECK(o.bias.device() == o.input.device(), "bias is on ", o.bias.device(), ", input is on ", o.input.device());
  return output;
}

// What conv2d's check does not see: the residual, and dtypes that have no order.
void check_residual(const Tensor& input, const Tensor& residual, SymIntArrayRef output) {
  check_floating(input, "input");
  if (!residual.defined()) return;
  check_same(input, "input", residual, "residual");
  TORCH_CHECK(residual.sym_sizes().equals(output), "residual must have the size of the output, ", output, ", got ",
              residual.sym_sizes());
}

// In place; returns the activation's bits, empty unless they are asked for.
Tensor activate_(Tensor& y, Activation activation, bool keep_mask) {
  if (activation == Activation::none) return no_bits(y);
  const bool relu = activation == Activation::relu;
  if (keep_mask) {
    static const auto op = find_operator<Tensor(Tensor&, std::string_view, double, double, std::string_view)>(
        "freezekit::activation_bits_");
    return op.call(y, relu ? "relu" : "hardtanh", 0, relu ? 0 : kRelu6End, "auto");
  }
  if (relu) {
    at::relu_(y);
  } else {
    at::hardtanh_(y, 0, kRelu6End);
  }
  return no_bits(y);
}

// What is done beside the convolution, by which choices tell problems apart; shorter where there is no choice.
std::string variant_of(const Tensor& on, std::initializer_list<std::pair<bool, const char*>> parts,
                       const FixedNormTensors& norm, const Tensor& bias) {
  std::string text = "frozen";
  if (!choices::candidate_on(on.device().type())) return text;
  for (const auto& [present, name] : parts) {
    if (present) text += std::string("+") + name;
  }
  if (!norm.defined()) return text;
  text += "+norm=";  // kernels read a vector of each dtype by other code, and none by none
  for (const Tensor* const of : {&norm.mean, &norm.var, &norm.gamma, &norm.beta, &bias}) {
    text += of->defined() ? *c10::toString(of->scalar_type()) : '-';
  }
  return text;
}

// By freezekit's kernels: one launch, and a tiny one for a norm; bits in NHWC order. Without `activates` what is before the
// activation.
Tensor frozen_by_kernels(const Conv2dProblem& problem, const FrozenOperands& o, const FrozenConv2d& f, bool activates,
                         at::MemoryFormat format, const Tensor& bits, Backend backend) {
  const Affine affine = affine_of(o.norm, o.bias, o.input, backend);
  native::Finish finish;
  finish.scale = affine.scale, finish.bias = affine.shift, finish.residual = o.residual;
  finish.relu = activates && f.has_mask();
  if (f.activation == Activation::relu6) finish.relu_end = kRelu6End;
  if (finish.relu && bits.numel() > 0) finish.mask_out = bits;
  return native::conv2d_epilogue(problem, o.input, o.weight, finish, f.geometry.with(backend), format);
}

// (y, bits) by ATen's convolution, in the wanted layout. On a CPU one pass does what is left; elsewhere torch's operators.
std::tuple<Tensor, Tensor> frozen_by_aten(const Conv2dProblem& problem, const FrozenOperands& o, const FrozenConv2d& f,
                                          at::MemoryFormat format, bool keep_mask) {
  const Geometry& g = f.geometry;
  const Tensor& x = o.input;
  const Tensor r = o.residual.defined() ? o.residual.contiguous(format) : o.residual;
  const bool passes = x.is_cpu() && (o.norm.defined() || r.defined() || f.has_mask());
  const Affine all = passes ? affine_of(o.norm, o.bias, x, Backend::aten) : Affine();
  Tensor y;
  if (passes && few_positions::takes(Operator::fprop, problem, x, o.weight)) {
    y = few_positions::conv2d(problem, x, o.weight);
  } else if (passes && winograd::takes(Operator::fprop, problem, x, o.weight) && !bends_at_zero(f.activation, all)) {
    y = winograd::conv2d(problem, x, o.weight);
  }
  const bool inside =
      o.bias.defined() && o.bias.scalar_type() == x.scalar_type() && !y.defined() && !(passes && o.norm.defined());
  if (!y.defined()) y = aten::conv2d(x, o.weight, inside ? std::make_optional(o.bias) : std::nullopt, g);
  y = finish(y, format);
  const Tensor left = inside ? Tensor() : o.bias;  // of the bias, to be added
  if (passes && (o.norm.defined() || r.defined() || left.defined())) {
    Affine affine = inside ? Affine() : all;
    if (left.defined() && !affine.is_finite) {  // then the order of sums and products decides between infinity and NaN
      y.add_(left.view({1, -1, 1, 1}));
      affine = affine_of(o.norm, Tensor(), x, Backend::aten);
    }
    const Tensor bits = finish_(y, affine, r, f.activation, keep_mask);
    return {y, bits};
  }
  if (left.defined()) y.add_(left.view({1, -1, 1, 1}));
  if (o.norm.defined()) {
    const FixedNormTensors& n = o.norm;
    y = at::batch_norm(y, optional_of(n.gamma), optional_of(n.beta), optional_of(n.mean), optional_of(n.var),
                       /*training=*/false, /*momentum=*/0, n.eps, at::globalContext().userEnabledCuDNN());
  }
  if (r.defined()) y.add_(r);
  const Tensor bits = activate_(y, f.activation, keep_mask);
  return {y, bits};
}

// Kernels know bits in NHWC order. Where they were demanded, that is the order of bits; under `auto` it is the result's, and
// a pass over a result in NCHW applies or makes them.
bool has_kernels_bits(Backend demand, at::MemoryFormat format) { return is_own(demand) || format == kLast; }

// In place of a vector of the caller's, beside tensors of `type`.
Tensor vector_of(const proof::Rehearsal& own, const Tensor& like, at::ScalarType type, std::vector<double> table) {
  if (!like.defined()) return like;
  return own.per_channel(like.scalar_type() == type ? own.dtype : like.scalar_type(), like, std::move(table));
}

// A norm whose scale is 1, -2 or another power of two, so that what it multiplies stays exact.
FixedNormTensors norm_of(const proof::Rehearsal& own, const FixedNormTensors& like, at::ScalarType type) {
  constexpr double eps = 0x1p-6;
  const auto vector = [&](const Tensor& of, std::vector<double> table) {
    return vector_of(own, of, type, std::move(table));
  };
  return {vector(like.gamma, {1, -2, 1, 2, -1}), vector(like.beta, {3, -1, 0, 2, -3}),
          vector(like.mean, {1, 0, -2, 2, -1, 4, -3}), vector(like.var, {1 - eps, 4 - eps, 0.25 - eps}), eps};
}

// What a norm, a bias and a residual add to a convolution's terms, at most.
Conv2dStep::Beside beside_of(const FixedNormTensors& n, const Tensor& bias, const Tensor& residual,
                             const Tensor& like) {
  const auto size = [](const Tensor& of) { return of.defined() ? of.abs() : of; };
  const auto largest = [](const Tensor& of) { return of.defined() ? proof::largest_in(of) : 0; };
  const Tensor mean = n.mean.defined() ? n.mean.abs().neg() : n.mean;  // a norm takes it away
  const Affine affine = affine_of({size(n.gamma), size(n.beta), mean, n.var, n.eps}, size(bias), like, Backend::aten);
  return {n.defined() ? largest(affine.scale) : 1, largest(affine.shift) + largest(residual)};
}

FrozenOperands operands_of(const proof::Rehearsal& own, const FrozenOperands& like) {
  const auto type = like.input.scalar_type();
  return {own.x(like.input), own.weight(like.weight), vector_of(own, like.bias, type, {-2, 1, 0, 2, -1}),
          like.residual.defined() ? own.y(like.residual) : Tensor(), norm_of(own, like.norm, type)};
}

std::tuple<Tensor, Tensor> frozen_kernel(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  const Geometry& g = f.geometry;
  const auto output = check_operands(o, g);
  const Conv2dProblem problem = problem_of(o.input.sizes(), o.weight.sizes(), C10_AS_INTARRAYREF_SLOW(output), g);
  check_residual(o.input, o.residual, output);
  const BelowAutogradAndAutocast below;
  const bool wanted = keep_mask && f.has_mask();
  const at::MemoryFormat format = result_format(o, output);
  Tensor bits;
  const auto compute = [&](Backend on, const Conv2dProblem& p, const FrozenOperands& operands, const FrozenConv2d& by) {
    Tensor y;
    if (on == Backend::aten) {
      std::tie(y, bits) = frozen_by_aten(p, operands, by, format, wanted);
      return y;
    }
    const bool activates = has_kernels_bits(g.backend, format);
    bits = at::empty({wanted && activates ? mask_words(p.y_numel()) : 0}, operands.input.options().dtype(at::kInt));
    y = frozen_by_kernels(p, operands, by, activates, format, bits, on);
    if (!activates) bits = activate_(y, f.activation, wanted);
    return y;
  };
  const bool is_wide = o.bias.defined() && o.bias.scalar_type() != o.input.scalar_type() && !o.norm.defined();
  const std::string variant = variant_of(o.input,
                                         {{o.bias.defined(), is_wide ? "wide_bias" : "bias"},
                                          {o.residual.defined(), "residual"},
                                          {f.has_mask(), to_string(f.activation)},
                                          {wanted, "mask"}},
                                         o.norm, o.bias);
  // Near the ends of the activation the two ways may round to different sides: bits belong to the result beside them.
  const auto faults = [&](const Tensor& own) {
    if (!wanted) return std::string();
    const bool relu = f.activation == Activation::relu;
    const Tensor ends = relu ? own.le(0) : own.le(0).logical_or_(own.ge(kRelu6End));
    return proof::difference(pack_bits(ends.logical_not_()), bits);
  };
  const auto beside = [&o] { return beside_of(o.norm, o.bias, o.residual, o.input); };
  const Tensor y = computed(
      {Operator::fprop, problem, o.input, o.weight, format, variant, beside, faults}, g.backend,
      [&](Backend on) { return compute(on, problem, o, f); },
      [&](Backend on, const proof::Rehearsal& own) {
        FrozenConv2d by = f;
        by.geometry = own.geometry(g);
        return compute(on, own.problem, operands_of(own, o), by);
      });
  return {y, bits};
}

Tensor by_channel(const Tensor& tensor, const Tensor& scale, int64_t channel_dim) {
  std::vector<int64_t> size(4, 1);
  size[channel_dim] = scale.size(0);
  // Products in scale's float32, which a GPU stores in the tensor's dtype in the same pass: 4 bytes per element in bf16.
  Tensor result = at::empty_like(tensor);
  return at::mul_out(result, tensor, scale.view(size));
}

Tensor dgrad_by_aten(const Conv2dProblem& problem, const FrozenGrad& o, const Tensor& scale, const Geometry& g) {
  Tensor dy = o.grad_output, w = o.weight;
  // The norm's factor goes into the pass that masks, or into whichever of both is the smaller.
  const bool into_weight = scale.defined() && !o.grad_mask.defined() && w.numel() < dy.numel();
  if (into_weight) {
    w = by_channel(w, scale, 0);
  } else if (dy.is_cpu() && (scale.defined() || o.grad_mask.defined())) {
    dy = scale_back(is_nchw_or_nhwc(dy) ? dy : dy.contiguous(), o.grad_mask, scale);
  } else {
    if (o.grad_mask.defined()) dy = gate(dy, o.grad_mask, {dy.sym_strides(), GateRule(), Backend::automatic});
    if (scale.defined()) dy = by_channel(dy, scale, 1);
  }
  Tensor dx;
  if (few_positions::takes(Operator::dgrad, problem, dy, w)) {
    dx = few_positions::dgrad(problem, dy, w);
  } else if (few_channels::takes(problem, dy, w)) {
    dx = few_channels::dgrad(problem, dy, w);
  } else if (winograd::takes(Operator::dgrad, problem, dy, w)) {
    dx = winograd::dgrad(problem, dy, w);
  }
  if (!dx.defined()) dx = aten::dgrad(dy, w, o.input_size, g);
  dx = finish(dx, format_of(o.channels_last));
  if (o.residual.defined()) dx.add_(o.residual);
  if (o.mask.defined()) gate_inplace(dx, o.mask, {}, Backend::automatic);
  return dx;
}

Tensor dgrad_by_kernels(const Conv2dProblem& problem, const FrozenGrad& o, const Tensor& mask, const Tensor& scale,
                        const Geometry& g) {
  const Tensor dy = o.grad_mask.defined()
                        ? gate(o.grad_output, o.grad_mask, {o.grad_output.sym_strides(), GateRule(), g.backend})
                        : o.grad_output;
  return native::dgrad_epilogue(problem, dy, o.weight, scale, o.residual, mask, g, format_of(o.channels_last));
}

void check_mask(const Tensor& mask, int64_t numel, const char* name) {
  TORCH_CHECK(
      !mask.defined() || (mask.scalar_type() == at::kInt && mask.dim() == 1 && mask.numel() == mask_words(numel)), name,
      " must be one row of ", mask_words(numel), " int32 words, got ", mask.defined() ? mask.scalar_type() : at::kInt,
      " of size ", mask.defined() ? mask.sizes() : IntArrayRef());
}

Tensor frozen_dgrad_kernel(const FrozenGradCall& call) {
  const auto& [o, g] = call;
  const IntArrayRef size = C10_AS_INTARRAYREF_SLOW(o.input_size);
  check_dgrad(o.grad_output, o.weight, o.input_size, g);
  check_norm(o.norm, o.weight);
  const Conv2dProblem problem = problem_of(size, o.weight.sizes(), o.grad_output.sizes(), g);
  check_residual(o.grad_output, o.residual, o.input_size);
  check_mask(o.mask, problem.x_numel(), "mask");
  check_mask(o.grad_mask, problem.y_numel(), "grad_mask");
  TORCH_CHECK(!o.grad_mask.defined() || is_nchw_or_nhwc(o.grad_output),
              "grad_output must be contiguous or channels_last under a grad_mask, got strides ",
              o.grad_output.strides());
  const BelowAutogradAndAutocast below;
  const at::MemoryFormat format = format_of(o.channels_last);
  const auto compute = [&](Backend on, const Conv2dProblem& p, const FrozenGrad& grad, const Geometry& by) {
    const Tensor scale = affine_of(grad.norm, Tensor(), grad.grad_output, on).scale;
    if (on == Backend::aten) return dgrad_by_aten(p, grad, scale, by);
    const bool masks = has_kernels_bits(g.backend, format);
    const Tensor dx = dgrad_by_kernels(p, grad, masks ? grad.mask : Tensor(), scale, by.with(on));
    if (!masks && grad.mask.defined()) gate_inplace(dx, grad.mask, {}, on);
    return dx;
  };
  const std::string variant =
      variant_of(o.grad_output,
                 {{o.residual.defined(), "residual"}, {o.mask.defined(), "mask"}, {o.grad_mask.defined(), "grad_mask"}},
                 o.norm, {});
  const auto beside = [&o = o] { return beside_of(o.norm, Tensor(), o.residual, o.grad_output); };
  return computed(
      {Operator::dgrad, problem, o.grad_output, o.weight, format, variant, beside}, g.backend,
      [&](Backend on) { return compute(on, problem, o, g); },
      [&](Backend on, const proof::Rehearsal& own) {
        const auto x_size = own.x_size();
        const auto bits = [&](const Tensor& of, int64_t numel) {
          return of.defined() ? proof::mixed_bits(mask_words(numel), of) : of;
        };
        return compute(
            on, own.problem,
            {own.y(o.grad_output), own.weight(o.weight), x_size, o.residual.defined() ? own.x(o.residual) : Tensor(),
             bits(o.mask, own.problem.x_numel()), bits(o.grad_mask, own.problem.y_numel()),
             norm_of(own, o.norm, o.grad_output.scalar_type()), o.channels_last},
            own.geometry(g));
      });
}

std::tuple<Tensor, Tensor> frozen_meta(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  const auto size = check_operands(o, f.geometry);
  check_residual(o.input, o.residual, size);
  const Tensor y = at::empty_symint(size, o.input.options(), result_format(o, size));
  const c10::SymInt words = keep_mask && f.has_mask() ? (y.sym_numel() + 31) / 32 : c10::SymInt(0);
  return {y, at::empty_symint({words}, o.input.options().dtype(at::kInt))};
}

Tensor frozen_dgrad_meta(const FrozenGradCall& call) {
  const auto& [o, g] = call;
  check_dgrad(o.grad_output, o.weight, o.input_size, g);
  check_norm(o.norm, o.weight);
  check_residual(o.grad_output, o.residual, o.input_size);
  return at::empty_symint(o.input_size, o.grad_output.options(), format_of(o.channels_last));
}

}  // namespace

FrozenConv2d::FrozenConv2d(std::string_view name, Geometry g) : geometry(std::move(g)) {
  const auto found = std::find(kActivations.begin(), kActivations.end(), name);
  TORCH_CHECK_VALUE(found != kActivations.end(), "activation must be 'none', 'relu' or 'relu6', got '", name, "'");
  activation = static_cast<Activation>(found - kActivations.begin());
}

const char* to_string(Activation activation) { return kActivations[static_cast<size_t>(activation)]; }

std::vector<c10::SymInt> dense_stride(SymIntArrayRef size, bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], c10::SymInt(1), size[1] * size[3], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], c10::SymInt(1)};
}

Tensor scaled_by_norm(const Tensor& grad_output, const FixedNormTensors& norm) {
  if (!norm.defined()) return grad_output;
  const auto wide = grad_output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor scale = norm.var.to(wide).add(norm.eps).rsqrt();
  if (norm.gamma.defined()) scale = scale * norm.gamma.to(wide);
  return (grad_output * scale.view({1, -1, 1, 1})).to(grad_output.scalar_type());
}

at::MemoryFormat result_format(const FrozenOperands& o, SymIntArrayRef size) {
  const at::MemoryFormat format = layout_of(o.input, o.weight);
  return o.norm.defined() ? elementwise_format(format, size) : format;
}

bool is_laid_out_as_by_layers(const FrozenOperands& o, const FrozenConv2d& f, SymIntArrayRef size) {
  const at::MemoryFormat format = result_format(o, size);
  if ((f.has_mask() || o.residual.defined()) && elementwise_format(format, size) != format) return false;
  return !o.residual.defined() || is_laid_out(o.residual, format);
}

std::tuple<Tensor, Tensor> frozen_conv2d(const FrozenOperands& o, const FrozenConv2d& f, bool keep_mask) {
  return FrozenOperator::call({o, f}, keep_mask);
}

Tensor frozen_conv2d_dgrad(const FrozenGrad& o, const Geometry& g) {
  static const FrozenGradOperator op("freezekit::frozen_conv2d_dgrad");
  return op({o, g});
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "frozen_conv2d(Tensor input, Tensor weight, Tensor? bias=None, Tensor? residual=None, str activation=\"none\", "
      "SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, Tensor? running_mean=None, Tensor? running_var=None, float eps=0.0, "
      "str backend=\"auto\", bool keep_mask=False) -> (Tensor, Tensor)",
      tags);
  m.def(
      "frozen_conv2d_dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, Tensor? residual=None, "
      "Tensor? mask=None, SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, "
      "Tensor? grad_mask=None, Tensor? norm_weight=None, Tensor? running_var=None, float eps=0.0, "
      "bool channels_last=False, str backend=\"auto\") -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_kernel>);
  m.impl("frozen_conv2d_dgrad", freezekit::FrozenGradOperator::kernel<freezekit::frozen_dgrad_kernel>);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("frozen_conv2d", freezekit::FrozenOperator::kernel<freezekit::frozen_meta>);
  m.impl("frozen_conv2d_dgrad", freezekit::FrozenGradOperator::kernel<freezekit::frozen_dgrad_meta>);
}
