// Thresholds that keep one bit per element, for whoever calls them instead of torch's.
#pragma once

#include <ATen/core/Scalar.h>
#include <ATen/core/Tensor.h>

namespace freezekit {

// x where it exceeds the threshold or is NaN, else `value`; dx is dy where x passed, else 0. x has data on a CPU that
// nothing sees, or is on the meta device.
at::Tensor record_threshold(const at::Tensor& x, const at::Scalar& threshold, const at::Scalar& value);
void record_threshold_(at::Tensor& x, const at::Scalar& threshold, const at::Scalar& value);

}  // namespace freezekit
