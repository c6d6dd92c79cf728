// One bit per element: where an activation or a dropout let a value through, packed as core/mask.h says.
//
// Bits follow the memory order of a dense tensor, which its strides name. A gate is that mask as a linear map:
//   gate(x, bits, stride, on, off):  y[i] = bit[i] ? on * x[i] : off * x[i];   off = None selects 0, which stops NaN
// It is its own transpose, so its derivative of any order is itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "torch/autograd/formula.h"
#include "torch/backends/native_layers.h"
#include "torch/common/bit_mask.h"
#include "torch/common/checks.h"
#include "torch/common/operators.h"

namespace freezekit {

constexpr int64_t kWordsPerTask = 1024;  // 32768 elements, as torch cuts elementwise work

// A gate as the operator's settings: the strides that bits are laid out by, the rule, the backend.
struct GateSettings {
  using Flat = Arguments<SymIntArrayRef, double, std::optional<double>, std::string_view>;

  GateSettings() = default;
  GateSettings(SymIntArrayRef stride, const GateRule& rule, Backend backend)
      : stride(stride.begin(), stride.end()), rule(rule), backend(backend) {}
  GateSettings(SymIntArrayRef stride, double on, std::optional<double> off, std::string_view backend)
      : GateSettings(stride, {on, off}, parse_backend(backend)) {}

  template <class F>
  auto apply(const F& f) const {
    return f(stride, rule.on, rule.off, to_string(backend));
  }

  SizeVector stride;
  GateRule rule;
  Backend backend = Backend::automatic;
};

Tensor gate(const Tensor& input, const Tensor& bits, const GateSettings&);

// The operand that torch's own backward operator reads beside dy. How the two are laid out decides how dx is.
struct Operand {
  Operand() = default;
  // The layer's input; else one with the strides that bits are laid out by.
  explicit Operand(const Tensor& x) {
    if (!x.is_non_overlapping_and_dense()) stride.assign(x.sym_strides().begin(), x.sym_strides().end());
  }

  // `dx`, which nobody else holds yet, with the strides that torch gives it. `slope`: what torch reads as well.
  Tensor finish(Tensor dx, const Tensor& dy, SymIntArrayRef stride_of_bits, const Tensor& slope = {}) const;

  SizeVector stride;  // where they are not those of bits
  bool is_first = true;
};

// The backward pass through a gate whose bits are kept.
struct GateGradient {
  GateSettings gate;
  Link linked;
  Operand operand;

  auto fields() {
    return std::tie(gate.stride, gate.rule.on, gate.rule.off, gate.backend, operand.stride, operand.is_first);
  }
  Link link() const { return linked; }
  variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const;
};

// `input` as a tensor without gaps or overlaps, in the memory order that torch's elementwise operators give results.
Tensor dense(const Tensor& input);

// The strides of dense(input).
SizeVector dense_strides(const Tensor& input);

// Bit = (input > 0) of a dense tensor without NaN.
Tensor positive_bits(const Tensor& input, Backend);

// The value of a leaky ReLU, and bit = (input > 0) in the value's memory order.
std::tuple<Tensor, Tensor> leaky_relu_bits(const Tensor& input, double slope, Backend);

// gate() on the storage of a dense tensor, whose memory order is that of bits.
void gate_inplace(const Tensor& dense, const Tensor& bits, const GateRule&, Backend);

}  // namespace freezekit
