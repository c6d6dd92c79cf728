// Activations that are linear in pieces: what backward needs of them is which piece, one bit per element.
//
//   activation(input, kind, a, b)         torch's value; its node keeps bits where torch keeps a tensor
//   activation_(input, kind, a, b)        the same in place
//   activation_bits, activation_bits_     the step below autograd: value and bits
//
//   kind         value                      gradient                   a, b
//   relu         max(x, 0)                  dy where x > 0, else 0
//   hardtanh     min(max(x, a), b)          dy where a < x < b, else 0 lowest and highest value
//   leaky_relu   x where x > 0, else a x    dy where x > 0, else a dy  a is the slope
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/gate.h"
#include "cpu/relu_avx512.h"
#include "cpu/simd.h"
#include "torch/backends/cpu_formats.h"
#include "torch/backends/native_layers.h"
#include "torch/backends/route.h"
#include "torch/bits/gate.h"
#include "torch/bits/layers.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

using native::by_torch;

constexpr std::array<const char*, 3> kKinds = {"relu", "hardtanh", "leaky_relu"};

ActivationKind parse_kind(std::string_view name) {
  const auto found = std::find(kKinds.begin(), kKinds.end(), name);
  TORCH_CHECK_VALUE(found != kKinds.end(), "kind must be 'relu', 'hardtanh' or 'leaky_relu', got '", name, "'");
  return static_cast<ActivationKind>(found - kKinds.begin());
}

struct Piecewise : PiecewiseActivation {
  using Flat = Arguments<std::string_view, double, double, std::string_view>;

  Piecewise(const PiecewiseActivation& activation, Backend backend)
      : PiecewiseActivation(activation), backend(backend) {}
  Piecewise(std::string_view kind, double a, double b, std::string_view backend)
      : Piecewise({parse_kind(kind), a, b}, parse_backend(backend)) {}

  template <class F>
  auto apply(const F& f) const {
    return f(freezekit::to_string(kind), a, b, freezekit::to_string(backend));
  }

  Backend backend;

  void by_aten_(Tensor& x) const {
    if (kind == ActivationKind::relu) {
      at::relu_(x);
    } else if (kind == ActivationKind::hardtanh) {
      at::hardtanh_(x, a, b);
    } else {
      at::leaky_relu_(x, a);
    }
  }
  // Torch makes a hardtanh's result like its input.
  Tensor empty_result(const Tensor& x) const {
    if (kind != ActivationKind::hardtanh || !x.is_non_overlapping_and_dense()) return empty_elementwise(x);
    return empty_beside(x, x.sym_sizes(), x.sym_strides(), x.scalar_type());
  }
  // Where the piece is the one with slope 1; NaN as in the formulas that torch has for GPUs.
  Tensor mask_by_aten(const Tensor& x) const {
    if (kind == ActivationKind::relu) return x.le(0).logical_not();
    if (kind == ActivationKind::hardtanh) return x.le(a).logical_or(x.ge(b)).logical_not();
    return x.gt(0);
  }
  // relu's backward operator reads the result, and leaky_relu's that of a call in place; else they read the input, of a
  // call in place a copy of it.
  GateGradient gradient(const Tensor& x, const Tensor* y) const {
    const bool inplace = !y;
    const bool of_result = kind == ActivationKind::relu || (inplace && kind == ActivationKind::leaky_relu);
    const Link link{of_result ? Link::To::result : Link::To::operands, 1, /*zeros=*/true, /*lasting=*/true};
    Operand operand = of_result || inplace ? Operand() : Operand(x);
    operand.is_first = kind != ActivationKind::hardtanh;
    return {{dense_strides(of_result && y ? *y : x), gate_of(*this), backend}, link, std::move(operand)};
  }
};

using ActivationOperator = SettingsOperator<Piecewise, Tensor(const Tensor& input)>;
using InplaceOperator = SettingsOperator<Piecewise, void(Tensor& input)>;
using BitsOperator = SettingsOperator<Piecewise, std::tuple<Tensor, Tensor>(const Tensor& input)>;
using InplaceBitsOperator = SettingsOperator<Piecewise, Tensor(Tensor& input)>;

// x and y dense and of one layout; they may be one tensor.
void bits_cpu(const Tensor& x, const Tensor& y, const Tensor& bits, const Piecewise& f) {
  auto* words = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  const int64_t numel = x.numel();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "freezekit::activation", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    using C = cpu::Compute<scalar_t>;
    // What is out of range is torch's error, of a hardtanh that of its input's type.
    const at::Scalar numbers[] = {f.a, f.b};
    const auto stored = [&](int i) { return static_cast<C>(numbers[i].to<scalar_t>()); };
    const bool is_stored = f.kind == ActivationKind::hardtanh;
    const C lowest = is_stored ? stored(0) : C(0), highest = is_stored ? stored(1) : C(0);
    const C a = numbers[0].to<C>(), b = numbers[1].to<C>();
    at::parallel_for(0, mask_words(numel), kWordsPerTask, [&](int64_t first, int64_t last) {
      const auto make = [&]<class Rule>(Rule rule) {
        cpu::in_vectors<cpu::make_bits<scalar_t, Rule>>(from, to, words, numel, first, last, rule);
      };
      if (f.kind == ActivationKind::relu) {
        first = cpu::relu_fast(from, to, words, first, std::clamp(numel / 32, first, last));
        make(cpu::Relu<scalar_t>{});
      } else if (f.kind == ActivationKind::hardtanh) {
        make(cpu::Hardtanh<scalar_t>{lowest, highest, a, b});
      } else {
        make(cpu::LeakyRelu<scalar_t>{a});
      }
    });
  });
}

void by_kernel(Computer computer, const Tensor& x, const Tensor& y, const Tensor& bits, const Piecewise& f) {
  if (computer == Computer::cpu) return bits_cpu(x, y, bits, f);
  native::activation(f, x, y, bits);
}

std::tuple<Tensor, Tensor> bits_kernel(const Tensor& input, const Piecewise& f) {
  check_floating(input, "input");
  const Tensor x = dense(input);
  const Computer computer = route_step(Op::activation, f.backend, x).computer;
  if (!has_kernel(computer)) return {by_torch(f, input), pack_bits(f.mask_by_aten(x))};
  const Tensor y = x.is_same(input) ? f.empty_result(x) : x;
  const Tensor bits = empty_bits(x);
  by_kernel(computer, x, y, bits, f);
  return {y, bits};
}

Tensor bits_inplace_kernel(Tensor& input, const Piecewise& f) {
  check_floating(input, "input");
  const Tensor x = dense(input);
  const Computer computer = route_step(Op::activation, f.backend, x).computer;
  if (!has_kernel(computer)) {
    const Tensor bits = pack_bits(f.mask_by_aten(x));
    f.by_aten_(input);
    return bits;
  }
  const Tensor bits = empty_bits(x);
  by_kernel(computer, x, x, bits, f);
  if (!x.is_same(input)) input.copy_(x);
  return bits;
}

std::tuple<Tensor, Tensor> bits_meta(const Tensor& input, const Piecewise& f) {
  check_floating(input, "input");
  return {f.empty_result(input), empty_bits(input)};
}

Tensor bits_inplace_meta(Tensor& input, const Piecewise&) {
  check_floating(input, "input");
  return empty_bits(input);
}

std::tuple<Tensor, Tensor> activation_bits(const Tensor& input, const Piecewise& f) {
  if (reaches_kernel(input)) return bits_kernel(input, f);
  static const BitsOperator op("freezekit::activation_bits");
  return op(input, f);
}

Tensor activation_bits_(Tensor& input, const Piecewise& f) {
  if (reaches_kernel(input)) return bits_inplace_kernel(input, f);
  static const InplaceBitsOperator op("freezekit::activation_bits_");
  return op(input, f);
}

Tensor activation_entry(const Tensor& input, const Piecewise& f) {
  if (route(Op::activation, f.backend, input).computer == Computer::formula) return by_torch(f, input);
  auto [result, bits] = below_autograd([&] { return activation_bits(input, f); });
  const auto node = formula_node("FreezekitActivationBackward", f.gradient(input, &result), input);
  return with_history(std::move(result), node, bits);
}

void activation_inplace_entry(Tensor& input, const Piecewise& f) {
  if (route(Op::activation, f.backend, input).computer == Computer::formula) return f.by_aten_(input);
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  const auto node = formula_node("FreezekitActivationBackward", f.gradient(input, /*y=*/nullptr), input);
  set_history_in_place(input, node, below_autograd([&] { return activation_bits_(input, f); }));
  if (node && input.is_view()) node->set_view(input);
}

void register_activations(torch::Library& m) {
  m.impl("activation", ActivationOperator::kernel<activation_entry>);
  m.impl("activation_", InplaceOperator::kernel<activation_inplace_entry>);
}

// Without autograd: in inference mode, and below other transforms.
Tensor activation_plain(const Tensor& input, const Piecewise& f) {
  return is_own(f.backend) ? std::get<0>(bits_kernel(input, f)) : by_torch(f, input);
}

void activation_inplace_plain(Tensor& input, const Piecewise& f) {
  if (is_own(f.backend)) {
    bits_inplace_kernel(input, f);
  } else {
    f.by_aten_(input);
  }
}

}  // namespace

const char* to_string(ActivationKind kind) { return kKinds[static_cast<size_t>(kind)]; }

Tensor record_activation(const Tensor& input, const PiecewiseActivation& f, Backend backend) {
  return activation_entry(input, {f, backend});
}

void record_activation_(Tensor& input, const PiecewiseActivation& f, Backend backend) {
  activation_inplace_entry(input, {f, backend});
}

Tensor positive_bits(const Tensor& input, Backend backend) {
  Tensor scratch = input;  // relu leaves its values as they are
  return activation_bits_(scratch, {{ActivationKind::relu}, backend});
}

std::tuple<Tensor, Tensor> leaky_relu_bits(const Tensor& input, double slope, Backend backend) {
  return activation_bits(input, {{ActivationKind::leaky_relu, slope, 0}, backend});
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string settings = "str kind, float a=0.0, float b=0.0, *, str backend=\"auto\") -> ";
  m.def(("activation(Tensor input, " + settings + "Tensor").c_str(), tags);
  m.def(("activation_(Tensor(a!) input, " + settings + "()").c_str(), tags);
  m.def(("activation_bits(Tensor input, " + settings + "(Tensor, Tensor)").c_str(), tags);
  m.def(("activation_bits_(Tensor(a!) input, " + settings + "Tensor").c_str(), tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("activation", ActivationOperator::kernel<activation_plain>);
  m.impl("activation_", InplaceOperator::kernel<activation_inplace_plain>);
  m.impl("activation_bits", BitsOperator::kernel<bits_kernel>);
  m.impl("activation_bits_", InplaceBitsOperator::kernel<bits_inplace_kernel>);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("activation_bits", BitsOperator::kernel<bits_meta>);
  m.impl("activation_bits_", InplaceBitsOperator::kernel<bits_inplace_meta>);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { register_activations(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { register_activations(m); }

}  // namespace freezekit
