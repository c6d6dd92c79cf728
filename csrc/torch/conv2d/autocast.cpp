// Autocast: conv2d runs in the low precision, as at::conv2d does.
//
// dgrad and wgrad fall through, as convolution_backward does: a backward pass that happens to run inside an autocast
// region keeps the dtype that its forward pass had.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/common/operators.h"

namespace freezekit {
namespace {

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Geometry& g) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kDevice); };
  return conv2d(cast(input), cast(weight), bias ? std::make_optional(cast(*bias)) : std::nullopt, g);
}

}  // namespace

TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) {
  m.impl("conv2d", Conv2dOperator::kernel<conv2d_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) {
  m.impl("conv2d", Conv2dOperator::kernel<conv2d_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>);
}

}  // namespace freezekit
