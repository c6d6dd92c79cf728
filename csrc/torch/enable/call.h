// Which calls a stand-in serves. A list of what it serves, not of what it does not: what is unknown is torch's.
#pragma once

#include <ATen/core/Scalar.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/backends/route.h"
#include "torch/common/operators.h"
#include "torch/common/unseen.h"
#include "torch/enable/enable.h"

namespace freezekit::enable {

using at::Tensor;

// Whether freezekit computes the value too, or torch's operator below autograd does, as in stock.
enum class Value { stock, ours };

namespace detail {
bool is_plain(const Tensor&);
bool is_compiled(const Tensor&);
bool has_modes();
bool is_watched_here();
}  // namespace detail

// Whether freezekit's node can stand for torch's. Undefined tensors are served. Dispatch modes and tracers are to see in
// both passes what they see in stock. torch.compile alone is served among them: what it makes of the node is compiled,
// and the forward operator is torch's own.
template <class... Tensors>
bool serves(Value value, const Tensor& input, const Tensors&... others) {
  if (!detail::has_modes()) return detail::is_plain(input) && (detail::is_plain(others) && ...);
  return value == Value::stock && detail::is_compiled(input) &&
         ((detail::is_plain(others) || detail::is_compiled(others)) && ...);
}

// Whether freezekit serves the call and its entry would not hand it back to torch's operator.
inline bool gains(Op op, const Tensor& input) {
  return serves(Value::ours, input) && route(op, Backend::automatic, input).computer != Computer::formula;
}

// The value of a setting that is a plain number.
inline std::optional<double> number_in(const at::Scalar& scalar) {
  const bool is_number = !scalar.isSymbolic() && (scalar.isFloatingPoint() || scalar.isIntegral(/*includeBool=*/false));
  return is_number ? std::optional(scalar.toDouble()) : std::nullopt;
}

}  // namespace freezekit::enable
