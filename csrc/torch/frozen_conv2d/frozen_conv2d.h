// A convolution that is frozen: constant weight and bias (a batch norm folded in), a residual, an activation.
//
//   y = act(conv(x, w) + b + residual),  act: none, relu, relu6
//   dx = bits of who made x ? dgrad(bits ? dy : 0, w) + what else flows to x : 0,  d residual = bits ? dy : 0
//
// Nothing is kept but one bit an element of y, and w. Bits lie as core/mask.h says, in the memory order in which the
// result is computed: NHWC by freezekit's kernels whatever the layout of the result, else that of the result.
#pragma once

#include <tuple>
#include <vector>

#include "torch/common/operators.h"

namespace freezekit {

struct FrozenConv2d {
  FrozenConv2d(std::string_view activation, std::optional<bool> channels_last, Geometry);

  enum class Activation { none, relu, relu6 };

  Activation activation;
  std::optional<bool> channels_last;  // the layout of the result; none: channels_last if an operand is
  Geometry geometry;

  bool has_mask() const { return activation != Activation::none; }
  bool own_kernels() const { return geometry.backend == Backend::native || geometry.backend == Backend::emulated; }
};

const char* to_string(FrozenConv2d::Activation);

// (y, bits); bits are empty unless they are asked for and there is an activation.
std::tuple<Tensor, Tensor> frozen_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, const FrozenConv2d&, bool keep_mask);

// (y, input): the input is handed on to its other readers, whose gradients this one's backward adds in its own dgrad.
std::tuple<Tensor, Tensor> frozen_conv2d_shared(const Tensor& input, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& residual, const FrozenConv2d&);

// bits ? dgrad(dy, w) + residual : 0. The result is channels_last if said so, else NCHW; bits lie as said above.
Tensor frozen_conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                           const Tensor& residual, const Tensor& bits, bool channels_last, const Geometry&);

// The same made of differentiable operators; `stride` is what bits lie in.
std::vector<c10::SymInt> dense_stride(SymIntArrayRef size, bool channels_last);

// activation in place, returning its bits.
Tensor activate_(Tensor& y, FrozenConv2d::Activation, bool keep_mask);

using FrozenConv2dSignature = std::tuple<Tensor, Tensor>(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    std::string_view activation, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
    std::optional<bool> channels_last, bool keep_mask, std::string_view backend);
using FrozenDgradSignature = Tensor(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                                    const std::optional<Tensor>& residual, const std::optional<Tensor>& mask,
                                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                                    bool channels_last, std::string_view backend);

}  // namespace freezekit
