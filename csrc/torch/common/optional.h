// Arguments that may be absent: autograd's functions take an undefined tensor for one.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace freezekit {

using OptionalTensor = std::optional<at::Tensor>;

inline const at::Tensor& tensor_of(const at::Tensor& tensor) { return tensor; }
inline const at::Tensor& tensor_of(const OptionalTensor& tensor) {
  static const at::Tensor none;
  return tensor ? *tensor : none;
}

inline OptionalTensor optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

// Whether it is there, and requires a gradient.
inline bool learns(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

}  // namespace freezekit
