// Max pooling's operators as C++ functions: below autograd, taps in place of indices.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "core/pooling.h"
#include "torch/common/operators.h"
#include "torch/max_pool2d/windows.h"

namespace freezekit {

// The settings as the schemas have them.
struct PoolGeometry : Windows<2> {
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, std::string_view>;

  PoolGeometry() = default;
  PoolGeometry(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
               bool ceil_mode, std::string_view backend)
      : Windows(kernel_size, stride, padding, dilation, ceil_mode), backend(parse_backend(backend)) {}
  // Of images of one row: the settings, each a list of one number, are those along it.
  static PoolGeometry of_rows(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding,
                              SymIntArrayRef dilation, bool ceil_mode, std::string_view backend);

  template <class F>
  auto apply(const F& f) const {
    return f(c10::fromIntArrayRefSlow(kernel_size), c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
             c10::fromIntArrayRefSlow(dilation), ceil_mode, to_string(backend));
  }

  // The same as numbers, with sizes of concrete tensors (N, C, H, W) and (N, C, P, Q) and the layout of all of them.
  MaxPool problem(IntArrayRef input_size, IntArrayRef output_size, at::MemoryFormat format) const;

  Backend backend = Backend::automatic;
};

using PoolOperator = SettingsOperator<PoolGeometry, Tensor(const Tensor& input)>;
using PoolPairOperator = SettingsOperator<PoolGeometry, std::tuple<Tensor, Tensor>(const Tensor& input)>;
using TapMapOperator =
    SettingsOperator<PoolGeometry, Tensor(const Tensor& values, const Tensor& taps, SymIntArrayRef size)>;

// freezekit::max_pool2d and max_pool2d_with_indices where autograd has its turn.
Tensor record_max_pool2d(const Tensor& input, const PoolGeometry&);
// The same of rows (N, C, W), by a geometry of rows.
Tensor record_max_pool1d(const Tensor& input, const PoolGeometry&);
std::tuple<Tensor, Tensor> record_max_pool2d_with_indices(const Tensor& input, const PoolGeometry&);
// Whether indices are made of taps. That takes a dozen passes: on a GPU, unless kernels are demanded, torch's one kernel
// makes them.
bool makes_indices(const Tensor& input, Backend);

// The value and, for each element of it, its tap.
std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& input, const PoolGeometry&);
// The gradient of the input: zeros of `input_size` (N, C, H, W), plus each element of grad_output where its tap is.
Tensor max_pool2d_scatter(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                          const PoolGeometry&);
// Its transpose: of `input`, the element at each tap.
Tensor max_pool2d_gather(const Tensor& input, const Tensor& taps, const PoolGeometry&);

}  // namespace freezekit
