// The operators as C++ functions that enter torch's dispatcher, and what their kernels share.
//
// The three convolutions are the partial derivatives of one trilinear form
//   T(x, w, y) = sum over n, k, p, q, c, r, s of y[n, k, p, q] * x[n, c, h, w'] * w[k, c, r, s]
// with respect to y (conv2d, fprop), x (conv2d_dgrad) and w (conv2d_wgrad). So each one's derivatives are the other two.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "core/problem.h"

namespace freezekit {

using at::Tensor;
using c10::IntArrayRef;
using c10::SymIntArrayRef;

enum class Backend : int8_t { automatic, native, aten, emulated };

Backend parse_backend(std::string_view name);
std::string_view to_string(Backend);

// Whether it demands freezekit's own kernels.
inline bool is_own(Backend backend) { return backend == Backend::native || backend == Backend::emulated; }

inline const char* name_of(Operator op) {
  constexpr const char* names[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"};
  return names[static_cast<int>(op)];
}

// Stride, padding and dilation as (height, width); a list of one number stands for both.
struct Geometry {
  Geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend);

  Geometry with(Backend other) const {
    Geometry copy = *this;
    copy.backend = other;
    return copy;
  }

  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  Backend backend;
};

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&);
Tensor conv2d_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry&);
Tensor conv2d_bias_grad(const Tensor& grad_output, Backend);

// The C++ signatures of the schemas in schema.cpp; every registered kernel has one of them.
using Conv2dSignature = Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                               std::string_view backend);
using GradSignature = Tensor(const Tensor& grad_output, const Tensor& other, SymIntArrayRef size, IntArrayRef stride,
                             IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view backend);

}  // namespace freezekit
