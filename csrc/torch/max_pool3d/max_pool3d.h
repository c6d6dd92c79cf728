// Max pooling in three dimensions, for whoever computes its value.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <tuple>

#include "torch/common/operators.h"
#include "torch/max_pool2d/windows.h"

namespace freezekit {

// The settings as (depth, height, width).
struct Windows3d : Windows<3> {
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool>;
  using Windows::Windows;

  template <class F>
  auto apply(const F& f) const {
    return f(c10::fromIntArrayRefSlow(kernel_size), c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
             c10::fromIntArrayRefSlow(dilation), ceil_mode);
  }
};

// Whether a node of freezekit's serves the call; else it is torch's.
bool keeps_taps(const Tensor& input, const Windows3d&);

// freezekit::max_pool3d where autograd has its turn.
Tensor record_max_pool3d(const Tensor& input, const Windows3d&);
// compute(), run below autograd, as value and torch's indices of a max pooling: its node keeps a tap per output. x is
// (N, C, D, H, W) or (C, D, H, W), and requires a gradient.
std::tuple<Tensor, Tensor> record_max_pool3d_with_indices(const Tensor& x, const Windows3d&,
                                                          c10::function_ref<std::tuple<Tensor, Tensor>()> compute);

}  // namespace freezekit
