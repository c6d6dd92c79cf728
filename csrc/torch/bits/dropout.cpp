// Dropout that keeps one bit an element.
//
//   y[i] = bit[i] ? x[i] / (1 - p) : 0 * x[i],   bit[i] = 1 with probability 1 - p
//
// The random numbers come from the very calls that torch makes, so a seed gives the result of torch's dropout: on a CPU
// bernoulli_ of a tensor of noise, which is freed at once, elsewhere native_dropout, whose mask of bytes is packed and
// freed. So a GPU's bits come from torch's own Philox stream.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/bits/gate.h"
#include "torch/backends/native_layers.h"

namespace freezekit {
namespace {

void check(const Tensor& input, double p) {
  TORCH_CHECK(p > 0 && p < 1, "p must lie between 0 and 1, ends excluded, got ", p);
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "input must be of a floating dtype, got ", input.scalar_type());
}

// What torch multiplies the survivors by: 1 / (1 - p), on a CPU as its division of the noise rounds it.
GateRule rule_of(const Tensor& input, double p) {
  if (!input.is_cpu() || input.scalar_type() == at::kDouble) return {1 / (1 - p), 0.0};
  const float scale = 1.0f / static_cast<float>(1 - p);
  if (input.scalar_type() == at::kHalf) return {static_cast<c10::Half>(scale), 0.0};
  if (input.scalar_type() == at::kBFloat16) return {static_cast<c10::BFloat16>(scale), 0.0};
  return {scale, 0.0};
}

Tensor draw_on_cpu(const Tensor& x, double p, std::string_view backend) {
  const Tensor noise = at::empty_like(x).bernoulli_(1 - p);
  return positive_bits(noise, backend);
}

// Of the dense bool tensor that was drawn for x on a GPU.
Tensor pack_drawn(const Tensor& x, const Tensor& mask, std::string_view backend) {
  if (computer_for(x, backend) != Computer::kernels) return pack_bits(mask);
  const Tensor bits = empty_bits(mask);
  native::pack_bytes(mask, bits);
  return bits;
}

std::tuple<Tensor, Tensor> bits_kernel(const Tensor& input, double p, std::string_view backend) {
  check(input, p);
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = dense(input);
  if (x.is_cpu()) {
    const Tensor bits = draw_on_cpu(x, p, backend);
    return {gate(x, bits, x.sym_strides(), rule_of(x, p), backend), bits};
  }
  const auto [y, mask] = at::native_dropout(x, p, true);
  return {y, pack_drawn(x, dense(mask), backend)};
}

Tensor bits_inplace_kernel(Tensor& input, double p, std::string_view backend) {
  check(input, p);
  const at::AutoDispatchBelowADInplaceOrView below;
  if (input.is_cpu()) {
    const Tensor x = dense(input);
    const Tensor bits = draw_on_cpu(x, p, backend);
    if (x.is_same(input)) {
      gate_inplace(x, bits, rule_of(x, p), backend);
    } else {
      input.copy_(gate(x, bits, x.sym_strides(), rule_of(x, p), backend));
    }
    return bits;
  }
  const auto [y, bits] = bits_kernel(input, p, backend);
  input.copy_(y);
  return bits;
}

std::tuple<Tensor, Tensor> bits_meta(const Tensor& input, double p, std::string_view) {
  check(input, p);
  return {at::empty_like(input), empty_bits(input)};
}

Tensor bits_inplace_meta(Tensor& input, double p, std::string_view) {
  check(input, p);
  return empty_bits(input);
}

Tensor dropout_aten(const Tensor& input, double p, bool train, std::string_view) {
  return at::dropout(input, p, train);
}

void dropout_inplace_aten(Tensor& input, double p, bool train, std::string_view) { at::dropout_(input, p, train); }

// What kernels are there for is to pack the bits; where none are kept, torch's dropout is all that there is.
Tensor dropout_batched(const Tensor& input, double p, bool train, std::string_view backend) {
  check_aten_is_allowed(backend);
  return at::dropout(input, p, train);
}

void dropout_inplace_batched(Tensor& input, double p, bool train, std::string_view backend) {
  check_aten_is_allowed(backend);
  at::dropout_(input, p, train);
}

// Whether nothing is drawn, or nothing kept.
bool is_trivial(const Tensor& input, double p, bool train, std::string_view backend) {
  if (needs_aten(input)) check_aten_is_allowed(backend);
  return !train || !(p > 0 && p < 1) || needs_aten(input) || !torch::autograd::compute_requires_grad(input) ||
         input.sym_numel() == 0;
}

Tensor dropout_autograd(const Tensor& input, double p, bool train, std::string_view backend) {
  if (is_trivial(input, p, train, backend)) return at::dropout(input, p, train);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("freezekit::dropout_bits", "").typed<decltype(bits_kernel)>();
  auto [result, bits] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(input, p, backend);
  }();
  const auto node = formula_node<gate_backward>("FreezekitDropoutBackward",
                                                gate_settings(result.sym_strides(), rule_of(input, p), backend), input);
  node->keep({bits});
  torch::autograd::set_history(result, node);
  return result;
}

void dropout_inplace_autograd(Tensor& input, double p, bool train, std::string_view backend) {
  if (is_trivial(input, p, train, backend)) {
    at::dropout_(input, p, train);
    return;
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("freezekit::dropout_bits_", "")
                             .typed<decltype(bits_inplace_kernel)>();
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  const auto node = formula_node<gate_backward>(
      "FreezekitDropoutBackward", gate_settings(dense_strides(input), rule_of(input, p), backend), input);
  const Tensor bits = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(input, p, backend);
  }();
  torch::autograd::impl::bump_version(input);
  node->keep({bits});
  torch::autograd::impl::rebase_history(input, {node, node->add_input_metadata(input)});
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  m.def("dropout(Tensor input, float p, bool train, *, str backend=\"auto\") -> Tensor", tags);
  m.def("dropout_(Tensor(a!) input, float p, bool train, *, str backend=\"auto\") -> ()", tags);
  m.def("dropout_bits(Tensor input, float p, *, str backend=\"auto\") -> (Tensor, Tensor)", tags);
  m.def("dropout_bits_(Tensor(a!) input, float p, *, str backend=\"auto\") -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("dropout", freezekit::dropout_aten);
  m.impl("dropout_", freezekit::dropout_inplace_aten);
  m.impl("dropout_bits", freezekit::bits_kernel);
  m.impl("dropout_bits_", freezekit::bits_inplace_kernel);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("dropout_bits", freezekit::bits_meta);
  m.impl("dropout_bits_", freezekit::bits_inplace_meta);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("dropout", freezekit::dropout_autograd);
  m.impl("dropout_", freezekit::dropout_inplace_autograd);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) {
  m.impl("dropout", freezekit::dropout_batched);
  m.impl("dropout_", freezekit::dropout_inplace_batched);
}
