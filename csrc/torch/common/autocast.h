// Autocast of an operator: what it makes of the operands, in the scope in which it makes no more of them.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "torch/common/operators.h"

namespace freezekit {

class Autocast {
 public:
  // For operands of the input's device.
  explicit Autocast(const at::Tensor& input)
      : device_(input.device().type()), dtype_(at::autocast::get_lower_precision_fp_from_device_type(device_)) {}

  at::Tensor operator()(const at::Tensor& tensor) const { return at::autocast::cached_cast(dtype_, tensor, device_); }
  OptionalTensor operator()(const OptionalTensor& tensor) const {
    return tensor ? std::make_optional((*this)(*tensor)) : std::nullopt;
  }

 private:
  const c10::impl::ExcludeDispatchKeyGuard no_more_{c10::autocast_dispatch_keyset};
  const c10::DeviceType device_;
  const at::ScalarType dtype_;
};

}  // namespace freezekit
