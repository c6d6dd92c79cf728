#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "cpu/gate.h"
#include "cpu/simd.h"
#include "torch/backends/cpu_formats.h"
#include "torch/bits/gate.h"
#include "torch/bits/layers.h"
#include "torch/common/layout.h"

namespace freezekit {
namespace {

using at::Scalar;

// x and y dense and of one layout; they may be one tensor.
Tensor threshold_bits(const Tensor& x, const Tensor& y, const Scalar& threshold, const Scalar& value) {
  const Tensor bits = empty_bits(x);
  if (x.is_meta() || x.key_set().has(c10::DispatchKey::Python)) return bits;  // no data to look at
  auto* words = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  const int64_t numel = x.numel();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "freezekit::threshold", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    // As torch has it: the value is rounded to the tensor's dtype, the threshold is not.
    const cpu::Threshold<scalar_t> rule{threshold.to<cpu::Compute<scalar_t>>(),
                                        cpu::bits_as<cpu::Bits<scalar_t>>(value.to<scalar_t>())};
    at::parallel_for(0, mask_words(numel), kWordsPerTask, [&](int64_t first, int64_t last) {
      cpu::in_vectors<cpu::make_bits<scalar_t, cpu::Threshold<scalar_t>>>(from, to, words, numel, first, last, rule);
    });
  });
  return bits;
}

auto node_of(const Tensor& x, Operand operand) {
  const Link link{Link::To::operands, /*count=*/1, /*zeros=*/true, /*lasting=*/true};
  GateGradient gradient{{dense_strides(x), GateRule(), Backend::automatic}, link, std::move(operand)};
  return formula_node("FreezekitActivationBackward", std::move(gradient), x);
}

}  // namespace

Tensor record_threshold(const Tensor& x, const Scalar& threshold, const Scalar& value) {
  Tensor y, bits;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor whole = dense(x);
    y = whole.is_same(x) ? empty_elementwise(x) : whole;
    bits = threshold_bits(whole, y, threshold, value);
  }
  return with_history(std::move(y), node_of(x, Operand(x)), bits);
}

void record_threshold_(Tensor& x, const Scalar& threshold, const Scalar& value) {
  torch::autograd::check_inplace(x, /*requires_grad=*/true);
  const auto node = node_of(x, Operand());
  const Tensor bits = below_autograd([&] {
    const Tensor whole = dense(x), made = threshold_bits(whole, whole, threshold, value);
    if (!whole.is_same(x)) x.copy_(whole);
    return made;
  });
  set_history_in_place(x, node, bits);
}

}  // namespace freezekit
