#include "torch/bits/gate.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/gate.h"
#include "cpu/relu_avx512.h"
#include "cpu/simd.h"
#include "torch/backends/cpu_formats.h"
#include "torch/backends/native_layers.h"
#include "torch/backends/proof.h"
#include "torch/backends/route.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

// x and y dense, in the memory order of bits; they may be one tensor.
void gate_cpu(const Tensor& x, const Tensor& y, const Tensor& bits, const GateRule& rule) {
  const auto* words = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
  const int64_t numel = x.numel();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "freezekit::gate", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    using C = cpu::Compute<scalar_t>;
    at::parallel_for(0, mask_words(numel), kWordsPerTask, [&](int64_t first, int64_t last) {
      const auto apply = [&]<class Rule>(Rule each) {
        cpu::in_vectors<cpu::apply_bits<scalar_t, Rule>>(from, to, words, numel, first, last, each);
      };
      if (rule.off) {
        apply(cpu::Scale<scalar_t>{static_cast<C>(rule.on), static_cast<C>(*rule.off)});
      } else {
        first = cpu::select_fast(from, to, words, first, std::clamp(numel / 32, first, last));
        apply(cpu::Select<scalar_t>{});
      }
    });
  });
}

Tensor gate_by_aten(const Tensor& x, const Tensor& bits, SymIntArrayRef stride, const GateRule& rule) {
  const Tensor mask = unpack_bits(bits, x.sym_sizes(), stride);
  if (!rule.off) return at::where(mask, x, 0);
  return at::where(mask, at::mul(x, rule.on), at::mul(x, *rule.off));
}

void check_gate(const Tensor& input, const Tensor& bits, const GateSettings& settings) {
  const SymIntArrayRef stride = settings.stride;
  const auto& [on, off] = settings.rule;
  check_floating(input, "input");
  TORCH_CHECK(bits.scalar_type() == at::kInt && bits.dim() == 1, "bits must be one row of int32 words, got ",
              bits.scalar_type(), " of size ", bits.sym_sizes());
  TORCH_CHECK(bits.device() == input.device(), "bits are on ", bits.device(), ", input is on ", input.device());
  TORCH_CHECK(static_cast<int64_t>(stride.size()) == input.dim(), "stride must have a number for each of input's ",
              input.dim(), " dimensions, got ", stride);
  TORCH_CHECK(off || on == 1, "on must be 1 where off is None, got ", on);
  TORCH_CHECK(bits.sym_size(0) == (input.sym_numel() + 31) / 32, "bits must have ", (input.sym_numel() + 31) / 32,
              " words for ", input.sym_numel(), " elements, got ", bits.sym_size(0));
}

Tensor empty_dense(const Tensor& input, SymIntArrayRef stride) {
  const Tensor result = empty_beside(input, input.sym_sizes(), stride, input.scalar_type());
  TORCH_CHECK(result.is_non_overlapping_and_dense(), "stride must be that of a dense tensor of size ",
              input.sym_sizes(), ", got ", stride);
  return result;
}

Tensor gate_kernel(const Tensor& input, const Tensor& bits, const GateSettings& settings) {
  const GateRule& rule = settings.rule;
  check_gate(input, bits, settings);
  Tensor result = empty_dense(input, settings.stride);
  const bool same = is_in_place(input, result.strides());
  switch (route_step(Op::gate, settings.backend, input).computer) {
    case Computer::cpu:
      gate_cpu(same ? input : result.copy_(input), result, bits.contiguous(), rule);
      break;
    case Computer::kernels:
      native::gate(rule, same ? input : result.copy_(input), bits.contiguous(), result);
      break;
    default:
      result.copy_(gate_by_aten(input, bits, settings.stride, rule));
  }
  return result;
}

Tensor gate_meta(const Tensor& input, const Tensor& bits, const GateSettings& settings) {
  check_gate(input, bits, settings);
  return at::empty_strided_symint(input.sym_sizes(), settings.stride, input.options());
}

Tensor gate_entry(const Tensor& input, const Tensor& bits, const GateSettings& settings) {
  if (route(Op::gate, settings.backend, input).computer == Computer::formula) {
    return gate_by_aten(input, bits, settings.stride, settings.rule);
  }
  const auto node = formula_node("FreezekitGateBackward", GateGradient{settings, {}, {}}, input);
  if (node) node->keep(bits);
  return recorded(node, [&] { return gate(input, bits, settings); });
}

using GateOperator = SettingsOperator<GateSettings, Tensor(const Tensor& input, const Tensor& bits)>;

}  // namespace

Tensor gate(const Tensor& input, const Tensor& bits, const GateSettings& settings) {
  if (reaches_kernel(input, bits)) return gate_kernel(input, bits, settings);
  static const GateOperator op("freezekit::gate");
  return op(input, bits, settings);
}

variable_list GateGradient::gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
  return {wanted[0] ? operand.finish(freezekit::gate(grad, kept(0), gate), grad, gate.stride) : Tensor()};
}

Tensor Operand::finish(Tensor dx, const Tensor& dy, SymIntArrayRef stride_of_bits, const Tensor& slope) const {
  if (!proof::is_plain(dy)) return dx;  // a subclass or a mode has layouts of its own
  const IntArrayRef own = C10_AS_INTARRAYREF_SLOW(stride.empty() ? stride_of_bits : SymIntArrayRef(stride));
  if (own == dy.strides() && own == dx.strides()) {  // mostly, and then that is what comes out
    if (slope.defined() ? is_laid_out(dx, at::MemoryFormat::Contiguous) : is_elementwise(dx, dx)) return dx;
  }
  const Tensor operand = at::empty({0}, dy.options());  // for its layout: nothing reads it
  operand.unsafeGetTensorImpl()->set_sizes_and_strides(dy.sizes(), own);
  if (slope.defined()) return finish_elementwise(std::move(dx), {operand, slope, dy});
  return finish_elementwise(std::move(dx), {is_first ? operand : dy, is_first ? dy : operand});
}

Tensor dense(const Tensor& input) {
  if (input.is_non_overlapping_and_dense()) return input;
  return at::empty_like(input).copy_(input);
}

SizeVector dense_strides(const Tensor& input) {
  const auto owned = [](const Tensor& tensor) -> SizeVector {
    return {tensor.sym_strides().begin(), tensor.sym_strides().end()};
  };
  if (input.is_non_overlapping_and_dense()) return owned(input);
  return owned(at::empty_like(input, input.options().device(at::kMeta)));
}

void gate_inplace(const Tensor& dense, const Tensor& bits, const GateRule& rule, Backend backend) {
  switch (route_step(Op::gate, backend, dense).computer) {
    case Computer::cpu:
      return gate_cpu(dense, dense, bits, rule);
    case Computer::kernels:
      return native::gate(rule, dense, bits, dense);
    default:
      dense.copy_(gate_by_aten(dense, bits, dense.sym_strides(), rule));
  }
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def(
      "gate(Tensor input, Tensor bits, SymInt[] stride, float on=1.0, float? off=None, *, str backend=\"auto\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { m.impl("gate", GateOperator::kernel<gate_kernel>); }
TORCH_LIBRARY_IMPL(freezekit, Meta, m) { m.impl("gate", GateOperator::kernel<gate_meta>); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { m.impl("gate", GateOperator::kernel<gate_entry>); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("gate", GateOperator::kernel<gate_entry>); }

}  // namespace freezekit
