// Autocast: conv2d runs in the low precision, as at::conv2d does.
//
// dgrad and wgrad fall through, as convolution_backward does: a backward pass that happens to run inside an autocast
// region keeps the dtype that its forward pass had.
#include "torch/common/autocast.h"

#include <torch/library.h>

#include "torch/common/operators.h"

namespace freezekit {
namespace {

Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Geometry& g) {
  const Autocast cast(input);
  return conv2d(cast(input), cast(weight), cast(bias), g);
}

}  // namespace

TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) { m.impl("conv2d", Conv2dOperator::kernel<conv2d_autocast>); }
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) { m.impl("conv2d", Conv2dOperator::kernel<conv2d_autocast>); }

}  // namespace freezekit
