// What a convolution is, apart from how it is computed and where its tensors are.
//
//   y[n, k, p, q] = b[k] + sum over c, r, s of x[n, c, h, w] * f[k, c, r, s]
//   h = p * stride_h - pad_h + r * dilation_h,   w = q * stride_w - pad_w + s * dilation_w
//
// With G groups, output channel k reads the C/G input channels of its own group only. All sizes in elements.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freezekit {

enum class Operator : int { fprop, dgrad, wgrad };

enum class DType : int { f32, f64, f16, bf16 };

FK_HOST_DEVICE constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct Conv2dProblem {
  int64_t n = 0, c = 0, h = 0, w = 0;  // activation x: N x C x H x W
  int64_t k = 0, r = 0, s = 0;         // filter: K x C/G x R x S
  int64_t p = 0, q = 0;                // output y: N x K x P x Q
  int64_t pad_h = 0, pad_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;

  FK_HOST_DEVICE int64_t c_per_group() const { return c / groups; }
  FK_HOST_DEVICE int64_t k_per_group() const { return k / groups; }
  FK_HOST_DEVICE int64_t x_numel() const { return n * c * h * w; }
  FK_HOST_DEVICE int64_t filter_numel() const { return k * c_per_group() * r * s; }
  FK_HOST_DEVICE int64_t y_numel() const { return n * k * p * q; }
};

// P (or Q) of one axis; 0 or less where the dilated kernel is larger than the padded input.
FK_HOST_DEVICE constexpr int64_t output_size(int64_t in, int64_t kernel, int64_t pad, int64_t stride,
                                             int64_t dilation) {
  return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace freezekit
