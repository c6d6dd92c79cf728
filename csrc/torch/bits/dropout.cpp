// Dropout that keeps one bit per element.
//
//   y[i] = bit[i] ? x[i] / (1 - p) : 0 * x[i],   bit[i] = 1 with probability 1 - p
//
// The random numbers come from the very calls that torch makes, so a seed gives the result of torch's dropout: on a CPU
// and in place bernoulli_ of a tensor of noise, which is freed at once, elsewhere native_dropout, whose mask of bytes is
// packed and freed. So a GPU's bits come from torch's own Philox stream.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/backends/native_layers.h"
#include "torch/backends/route.h"
#include "torch/bits/gate.h"
#include "torch/bits/layers.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

void check(const Tensor& input, double p) {
  TORCH_CHECK(p > 0 && p < 1, "p must be greater than 0 and less than 1, got ", p);
  check_floating(input, "input");
}

// Whether torch draws noise of the input's dtype, and not a mask of bytes.
bool draws_noise(const Tensor& input, bool inplace) { return inplace || input.is_cpu(); }

// What torch multiplies the survivors by: 1 / (1 - p), with noise as its division of the noise rounds it.
GateRule rule_of(const Tensor& input, double p, bool inplace) {
  if (!draws_noise(input, inplace) || input.scalar_type() == at::kDouble) return {1 / (1 - p), 0.0};
  const float scale = 1.0f / static_cast<float>(1 - p);
  if (input.scalar_type() == at::kHalf) return {static_cast<c10::Half>(scale), 0.0};
  if (input.scalar_type() == at::kBFloat16) return {static_cast<c10::BFloat16>(scale), 0.0};
  return {scale, 0.0};
}

Tensor draw_noise(const Tensor& x, double p, Backend backend) {
  const Tensor noise = at::empty_like(x).bernoulli_(1 - p);
  return positive_bits(noise, backend);
}

// Dropout's kernels are proven together, so one answer serves for all steps.
Backend settled(const Tensor& x, Backend backend) {
  if (route_step(Op::dropout, backend, x).computer != Computer::kernels) return backend;
  return x.is_cpu() ? Backend::emulated : Backend::native;
}

// Of the dense bool tensor that was drawn for x on a GPU.
Tensor pack_drawn(const Tensor& mask, Backend backend) {
  if (!is_own(backend)) return pack_bits(mask);
  const Tensor bits = empty_bits(mask);
  native::pack_bytes(mask, bits);
  return bits;
}

std::tuple<Tensor, Tensor> bits_kernel(const Tensor& input, double p, Backend demand) {
  check(input, p);
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = dense(input);
  const Backend backend = settled(x, demand);
  if (draws_noise(x, /*inplace=*/false)) {
    const Tensor bits = draw_noise(x, p, backend);
    const Tensor y = gate(x, bits, {x.sym_strides(), rule_of(x, p, false), backend});
    return {is_elementwise(y, input) ? y : finish_elementwise(y, {input, x}), bits};
  }
  const auto [y, mask] = at::native_dropout(x, p, true);
  return {y, pack_drawn(dense(mask), backend)};
}

Tensor bits_inplace_kernel(Tensor& input, double p, Backend demand) {
  check(input, p);
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = dense(input);
  const Backend backend = settled(x, demand);
  const Tensor bits = draw_noise(x, p, backend);
  const GateRule rule = rule_of(x, p, /*inplace=*/true);
  if (x.is_same(input)) {
    gate_inplace(x, bits, rule, backend);
  } else {
    input.copy_(gate(x, bits, {x.sym_strides(), rule, backend}));
  }
  return bits;
}

std::tuple<Tensor, Tensor> dropout_meta(const Tensor& input, double p, std::string_view) {
  check(input, p);
  return {empty_elementwise(input), empty_bits(input)};
}

Tensor dropout_inplace_meta(Tensor& input, double p, std::string_view) {
  check(input, p);
  return empty_bits(input);
}

void refuse_unmet(const Tensor& input, Backend backend) {
  if (is_own(backend)) route(Op::dropout, backend, input);
}

std::tuple<Tensor, Tensor> dropout_bits(const Tensor& input, double p, std::string_view backend) {
  return bits_kernel(input, p, parse_backend(backend));
}

Tensor dropout_bits_(Tensor& input, double p, std::string_view backend) {
  return bits_inplace_kernel(input, p, parse_backend(backend));
}

std::tuple<Tensor, Tensor> call_bits(const Tensor& input, double p, Backend backend) {
  if (reaches_kernel(input)) return bits_kernel(input, p, backend);
  static const auto op = find_operator<decltype(dropout_bits)>("freezekit::dropout_bits");
  return op.call(input, p, to_string(backend));
}

Tensor call_bits_(Tensor& input, double p, Backend backend) {
  if (reaches_kernel(input)) return bits_inplace_kernel(input, p, backend);
  static const auto op = find_operator<decltype(dropout_bits_)>("freezekit::dropout_bits_");
  return op.call(input, p, to_string(backend));
}

// Without autograd, in inference mode and below other transforms, there are no bits to pack.
Tensor dropout_plain(const Tensor& input, double p, bool train, std::string_view backend) {
  refuse_unmet(input, parse_backend(backend));
  return at::dropout(input, p, train);
}

void dropout_inplace_plain(Tensor& input, double p, bool train, std::string_view backend) {
  refuse_unmet(input, parse_backend(backend));
  at::dropout_(input, p, train);
}

// Whether torch's own dropout takes the call: nothing is drawn, or nothing kept. All that kernels do is to pack the bits.
bool is_left_to_torch(const Tensor& input, double p, bool train, Backend backend) {
  if (!train || !(p > 0 && p < 1) || !torch::autograd::compute_requires_grad(input)) {
    refuse_unmet(input, backend);
    return true;
  }
  return route(Op::dropout, backend, input).computer == Computer::formula || input.sym_numel() == 0;
}

// Torch multiplies dy by noise that is laid out as the input, without gaps. Such a product takes sparse tensors, too.
struct DropoutGradient : GateGradient {
  static constexpr bool kTakesSparse = true;

  DropoutGradient() = default;
  DropoutGradient(const Tensor& input, double p, bool inplace, Backend backend)
      : GateGradient{{dense_strides(input), rule_of(input, p, inplace), backend}, {}, {}} {
    operand.is_first = false;
  }

  variable_list gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
    if (!wanted[0] || grad.layout() == at::kStrided) return GateGradient::gradients(grad, kept, wanted);
    const Tensor ones = at::ones_symint(grad.sym_sizes(), grad.options().layout(at::kStrided));
    return {grad.mul(freezekit::gate(ones, kept(0), gate))};
  }
};

Tensor dropout_entry(const Tensor& input, double p, bool train, std::string_view backend) {
  return record_dropout(input, p, train, parse_backend(backend));
}

void dropout_inplace_entry(Tensor& input, double p, bool train, std::string_view backend) {
  record_dropout_(input, p, train, parse_backend(backend));
}

void register_dropout(torch::Library& m) {
  m.impl("dropout", dropout_entry);
  m.impl("dropout_", dropout_inplace_entry);
}

}  // namespace

Tensor record_dropout(const Tensor& input, double p, bool train, Backend backend) {
  if (is_left_to_torch(input, p, train, backend)) return at::dropout(input, p, train);
  auto [result, bits] = below_autograd([&] { return call_bits(input, p, backend); });
  const auto node =
      formula_node("FreezekitDropoutBackward", DropoutGradient(input, p, /*inplace=*/false, backend), input);
  return with_history(std::move(result), node, bits);
}

void record_dropout_(Tensor& input, double p, bool train, Backend backend) {
  if (is_left_to_torch(input, p, train, backend)) {
    at::dropout_(input, p, train);
    return;
  }
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  const auto node =
      formula_node("FreezekitDropoutBackward", DropoutGradient(input, p, /*inplace=*/true, backend), input);
  set_history_in_place(input, node, below_autograd([&] { return call_bits_(input, p, backend); }));
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  m.def("dropout(Tensor input, float p, bool train, *, str backend=\"auto\") -> Tensor", tags);
  m.def("dropout_(Tensor(a!) input, float p, bool train, *, str backend=\"auto\") -> ()", tags);
  m.def("dropout_bits(Tensor input, float p, *, str backend=\"auto\") -> (Tensor, Tensor)", tags);
  m.def("dropout_bits_(Tensor(a!) input, float p, *, str backend=\"auto\") -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("dropout", dropout_plain);
  m.impl("dropout_", dropout_inplace_plain);
  m.impl("dropout_bits", dropout_bits);
  m.impl("dropout_bits_", dropout_bits_);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("dropout_bits", dropout_meta);
  m.impl("dropout_bits_", dropout_inplace_meta);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { register_dropout(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { register_dropout(m); }

}  // namespace freezekit
