// Max pooling in three dimensions, for whoever computes its value.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <tuple>
#include <vector>

#include "torch/common/operators.h"

namespace freezekit {

// The settings as (depth, height, width); a list of one number stands for all three, an empty stride for the kernel. Where
// they are symbolic they are fixed, as by torch's own pooling, which has no operator for symbols.
struct Windows3d {
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool>;

  Windows3d() = default;
  Windows3d(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
            bool ceil_mode);

  // Whether the places in a window can be numbered in 32 bits.
  bool has_taps() const;
  // One byte up to 256 of them, two up to 32768, four beyond.
  at::ScalarType tap_type() const;

  std::vector<int64_t> kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
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
