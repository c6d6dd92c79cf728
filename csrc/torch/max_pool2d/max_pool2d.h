// Max pooling's operators as C++ functions: below autograd, taps in place of indices.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>

#include "core/pooling.h"
#include "torch/common/operators.h"

namespace freezekit {

// The settings as the schemas have them; a list of one number stands for both axes, an empty stride for the kernel.
struct PoolGeometry {
  PoolGeometry(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
               std::string_view backend);

  // The same as numbers, with sizes of concrete tensors (N, C, H, W) and (N, C, P, Q) and the layout of all of them.
  MaxPool problem(IntArrayRef input_size, IntArrayRef output_size, at::MemoryFormat format) const;
  // One byte up to 256 taps, two up to 32768, four beyond.
  at::ScalarType tap_type() const;

  std::array<int64_t, 2> kernel_size, stride, padding, dilation;
  bool ceil_mode;
  std::string backend;
};

// The C++ signatures of the schemas.
using TapsSignature = std::tuple<Tensor, Tensor>(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                                 IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                                 std::string_view backend);
using TapMapSignature = Tensor(const Tensor& values, const Tensor& taps, SymIntArrayRef size, IntArrayRef kernel_size,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                               std::string_view backend);

// The value and, for each element of it, its tap.
std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& input, const PoolGeometry&);
// The gradient of the input: zeros of `input_size` (N, C, H, W), plus each element of grad_output where its tap lies.
Tensor max_pool2d_scatter(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry&);
// Its transpose: of `input`, the element where each tap lies.
Tensor max_pool2d_gather(const Tensor& input, const Tensor& taps, const PoolGeometry&);
// Taps as torch's indices h * W + w.
Tensor max_pool2d_indices(const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry&);

}  // namespace freezekit
