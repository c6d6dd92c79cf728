// The settings of max pooling over two or three axes, and its taps: the place in its window that each output took.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <utility>

#include "torch/common/operators.h"

namespace freezekit {

namespace max_pool {

// One number for each of `axes` (two or three), or one for all. Where they are symbolic they are fixed, as by torch's own
// pooling, which has no operator for symbols.
void read_setting(SymIntArrayRef values, const char* name, int64_t* numbers, size_t axes);

// Of any number of axes.
struct AnyWindows {
  IntArrayRef kernel_size, stride, padding, dilation;
};

// For devices and transforms that have no kernel here, of the last axes of outputs and inputs:
// where taps are, as torch's indices ((d * H +) h) * W + w, and whether that is inside the input, which a dilated window
// can miss;
std::pair<Tensor, Tensor> indices_of_taps(const Tensor& taps, SymIntArrayRef input_size, const AnyWindows&);
// and the other way round, int64 as indices are.
Tensor taps_of_indices(const Tensor& indices, SymIntArrayRef input_size, const AnyWindows&);

}  // namespace max_pool

// A list of one number stands for all axes, an empty stride for the kernel.
template <size_t kAxes>
struct Windows {
  using Numbers = std::array<int64_t, kAxes>;

  Windows() = default;
  Windows(SymIntArrayRef kernels, SymIntArrayRef strides, SymIntArrayRef paddings, SymIntArrayRef dilations,
          bool ceil_mode)
      : ceil_mode(ceil_mode) {
    max_pool::read_setting(kernels, "kernel_size", kernel_size.data(), kAxes);
    max_pool::read_setting(strides.empty() ? kernels : strides, "stride", stride.data(), kAxes);
    max_pool::read_setting(paddings, "padding", padding.data(), kAxes);
    max_pool::read_setting(dilations, "dilation", dilation.data(), kAxes);
  }

  auto fields() { return std::tie(kernel_size, stride, padding, dilation, ceil_mode); }
  operator max_pool::AnyWindows() const { return {kernel_size, stride, padding, dilation}; }

  // As a number that cannot overflow.
  double taps() const {
    double product = 1;
    for (const int64_t extent : kernel_size) product *= static_cast<double>(extent);
    return product;
  }
  // One byte up to 256 of them, two up to 32768, four beyond.
  at::ScalarType tap_type() const { return taps() <= 256 ? at::kByte : taps() <= 32768 ? at::kShort : at::kInt; }

  Numbers kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
};

}  // namespace freezekit
