// The operators as C++ functions that enter torch's dispatcher, and what their kernels share. Schemas are flat lists of
// arguments; C++ functions take the settings of a call as one struct.
//
// The three convolutions are the partial derivatives of one trilinear form
//   T(x, w, y) = sum over n, k, p, q, c, r, s of y[n, k, p, q] * x[n, c, h, w'] * w[k, c, r, s]
// with respect to y (conv2d, fprop), x (conv2d_dgrad) and w (conv2d_wgrad). So each one's derivatives are the other two.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <cstdint>
#include <optional>

#include "core/problem.h"

namespace freezekit {

using at::Tensor;
using c10::IntArrayRef;
using c10::SymIntArrayRef;

// Arguments that may be absent: autograd's functions take an undefined tensor for one.
using OptionalTensor = std::optional<Tensor>;

inline const Tensor& tensor_of(const Tensor& tensor) { return tensor; }
inline const Tensor& tensor_of(const OptionalTensor& tensor) {
  static const Tensor none;
  return tensor ? *tensor : none;
}

inline OptionalTensor optional_of(const Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

// Whether it is there, and requires a gradient.
inline bool learns(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

template <class... T>
struct Arguments {};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// An operator on operands, then settings. `Settings` has
//   using Flat = Arguments<...>;           the C++ types of the arguments that it stands for, in the schema's order
//   Settings(Flat...);
//   apply(f), which calls f(Flat...)
template <class Settings, class Signature, class Flat = typename Settings::Flat>
class SettingsOperator;

template <class Settings, class Result, class... Operands, class... Flat>
class SettingsOperator<Settings, Result(Operands...), Arguments<Flat...>> {
 public:
  using Function = Result (*)(Operands..., const Settings&);

  explicit SettingsOperator(const char* name) : handle_(find_operator<Result(Operands..., Flat...)>(name)) {}

  // Enters torch's dispatcher.
  Result operator()(Operands... operands, const Settings& settings) const {
    return settings.apply([&](Flat... flat) -> Result { return handle_.call(operands..., flat...); });
  }

  // What the dispatcher calls: kFunction behind the schema's flat arguments.
  template <Function kFunction>
  static Result kernel(Operands... operands, Flat... flat) {
    return kFunction(operands..., Settings(flat...));
  }

 private:
  c10::TypedOperatorHandle<Result(Operands..., Flat...)> handle_;
};

enum class Backend : int8_t { automatic, native, aten, emulated };

Backend parse_backend(std::string_view name);
std::string_view to_string(Backend);

// Whether it demands freezekit's own kernels.
inline bool is_own(Backend backend) { return backend == Backend::native || backend == Backend::emulated; }

inline const char* name_of(Operator op) {
  constexpr const char* names[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"};
  return names[static_cast<int>(op)];
}

// Stride, padding and dilation as (height, width); a list of one number stands for both. While a graph is traced they may
// be symbolic; a kernel that computes on data sees plain numbers.
struct Geometry {
  using Pair = std::array<c10::SymInt, 2>;
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, c10::SymInt, std::string_view>;

  Geometry() = default;
  Geometry(SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
           std::string_view backend);
  using Numbers = std::array<int64_t, 2>;
  Geometry(const Numbers& stride, const Numbers& padding, const Numbers& dilation, int64_t groups, Backend backend)
      : stride{stride[0], stride[1]}, padding{padding[0], padding[1]}, dilation{dilation[0], dilation[1]},
        groups(groups), backend(backend) {}

  template <class F>
  auto apply(const F& f) const {
    return f(stride, padding, dilation, groups, to_string(backend));
  }

  Geometry with(Backend other) const {
    Geometry copy = *this;
    copy.backend = other;
    return copy;
  }

  Pair stride, padding, dilation;
  c10::SymInt groups = 1;
  Backend backend = Backend::automatic;
};

// Of a call on data, where all numbers are known.
inline std::array<int64_t, 2> ints(const Geometry::Pair& pair) { return {pair[0].expect_int(), pair[1].expect_int()}; }

// A batch norm with fixed statistics, as its live tensors: nothing is kept of what is made from them.
// All of size (K); gamma, beta and mean may be undefined: 1, 0, 0. Without var there is no norm.
struct FixedNormTensors {
  Tensor gamma, beta, mean, var;
  double eps = 0;

  bool defined() const { return var.defined(); }
};

using Conv2dOperator =
    SettingsOperator<Geometry, Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias)>;
using Conv2dGradOperator =
    SettingsOperator<Geometry, Tensor(const Tensor& grad_output, const Tensor& other, SymIntArrayRef size)>;

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&);
Tensor conv2d_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry&);
Tensor conv2d_bias_grad(const Tensor& grad_output, Backend);

}  // namespace freezekit
