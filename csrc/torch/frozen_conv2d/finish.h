// The passes of a frozen block around ATen's convolution, and the scale and shift that a norm is.
#pragma once

#include "torch/frozen_conv2d/frozen_conv2d.h"

namespace freezekit {

// A scale and a shift (K) in what tensors of `like`'s dtype are computed in: float64 for float64, else float32. From the
// norm's tensors as they are now; without a norm the scale is undefined and the shift is the bias.
struct Affine {
  Tensor scale, shift;
  bool is_finite = true;  // the scale, on a CPU
};
Affine affine_of(const FixedNormTensors&, const Tensor& bias, const Tensor& like, Backend on);

// Whether a convolution's result of exactly 0 ends, in some channel, where the activation bends: there a rounding error
// decides what its gradient is.
bool bends_at_zero(FrozenConv2d::Activation, const Affine&);

// activation(y * scale + shift + residual) in place; returns the activation's bits, empty unless they are asked for. y is
// dense, NCHW or NHWC, and the residual is laid out as y is.
Tensor finish_(Tensor& y, const Affine&, const Tensor& residual, FrozenConv2d::Activation, bool keep_mask);

// bits ? dy * scale : 0, dense and laid out as dy; undefined bits are all set. dy is dense, NCHW or NHWC.
Tensor scale_back(const Tensor& dy, const Tensor& bits, const Tensor& scale);

}  // namespace freezekit
