// A convolution that is frozen, the batch norm with fixed statistics behind it, a residual, an activation.
//
//   y = act(conv(x, w) * scale + shift + residual),  act: none, relu, relu6
//   scale = gamma / sqrt(var + eps),  shift = beta + (b - mean) * scale;  without a norm 1 and b
//   dx = bits of who made x ? dgrad(bits ? dy * scale : 0, w) + what else flows to x : 0,  d residual = bits ? dy : 0
//
// Scale and shift are made from the norm's tensors at each call, and again in the backward pass: nothing is kept but one
// bit per element of y, and the parameters themselves. Bits are laid out as core/mask.h says, in the memory order in
// which the result is computed: NHWC by freezekit's kernels whatever the layout of the result, else that of the result.
#pragma once

#include <tuple>
#include <vector>

#include "torch/common/fixed_norm.h"
#include "torch/common/operators.h"

namespace freezekit {

struct FrozenConv2d {
  FrozenConv2d(std::string_view activation, std::optional<bool> channels_last, Geometry);

  enum class Activation { none, relu, relu6 };

  Activation activation;
  std::optional<bool> channels_last;  // the layout of the result; none: channels_last if an operand is
  Geometry geometry;

  bool has_mask() const { return activation != Activation::none; }
  bool own_kernels() const { return is_own(geometry.backend); }
};

const char* to_string(FrozenConv2d::Activation);

// Tensors but input and weight may be undefined.
struct FrozenOperands {
  Tensor input, weight, bias, residual;
  FixedNormTensors norm;
};

// (y, bits); bits are empty unless they are asked for and there is an activation.
std::tuple<Tensor, Tensor> frozen_conv2d(const FrozenOperands&, const FrozenConv2d&, bool keep_mask);

// (y, input): the input is handed on to its other readers, whose gradients this one's backward adds in its own dgrad.
std::tuple<Tensor, Tensor> frozen_conv2d_shared(const FrozenOperands&, const FrozenConv2d&);

// mask ? dgrad(grad_mask ? grad_output * scale : 0, weight) + residual : 0, where undefined masks are all set. Of the norm
// gamma and var are read. grad_mask lies in grad_output's memory order, which is then dense; mask as said above.
struct FrozenGrad {
  Tensor grad_output, weight;
  SymIntArrayRef input_size;
  Tensor residual, mask, grad_mask;
  FixedNormTensors norm;
  bool channels_last;  // the layout of the result, else NCHW
};
Tensor frozen_conv2d_dgrad(const FrozenGrad&, const Geometry&);

// grad_output * scale, of differentiable operators.
Tensor scaled_by_norm(const Tensor& grad_output, const FixedNormTensors&);

// What bits lie in.
std::vector<c10::SymInt> dense_stride(SymIntArrayRef size, bool channels_last);

using OptionalTensor = std::optional<Tensor>;
inline OptionalTensor optional_of(const Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

using FrozenConv2dSignature = std::tuple<Tensor, Tensor>(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    std::string_view activation, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    c10::SymInt groups, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
    std::optional<bool> channels_last, bool keep_mask, std::string_view backend);
using FrozenSharedSignature = std::tuple<Tensor, Tensor>(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    std::string_view activation, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    c10::SymInt groups, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
    std::optional<bool> channels_last, std::string_view backend);
using FrozenDgradSignature = Tensor(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                                    const OptionalTensor& residual, const OptionalTensor& mask, SymIntArrayRef stride,
                                    SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                                    const OptionalTensor& grad_mask, const OptionalTensor& norm_weight,
                                    const OptionalTensor& running_var, double eps, bool channels_last,
                                    std::string_view backend);

// Kernels of those signatures, of functions that take the arguments in bundles.
template <auto kBody>
std::tuple<Tensor, Tensor> frozen_entry(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& residual, std::string_view activation,
                                        SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                        c10::SymInt groups, const OptionalTensor& norm_weight,
                                        const OptionalTensor& norm_bias, const OptionalTensor& running_mean,
                                        const OptionalTensor& running_var, double eps,
                                        std::optional<bool> channels_last, bool keep_mask, std::string_view backend) {
  const auto of = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
  return kBody(FrozenOperands{input,
                              weight,
                              of(bias),
                              of(residual),
                              {of(norm_weight), of(norm_bias), of(running_mean), of(running_var), eps}},
               FrozenConv2d(activation, channels_last, Geometry(stride, padding, dilation, groups, backend)),
               keep_mask);
}

template <auto kBody>
Tensor frozen_dgrad_entry(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                          const OptionalTensor& residual, const OptionalTensor& mask, SymIntArrayRef stride,
                          SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                          const OptionalTensor& grad_mask, const OptionalTensor& norm_weight,
                          const OptionalTensor& running_var, double eps, bool channels_last, std::string_view backend) {
  const auto of = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
  return kBody(FrozenGrad{grad_output,
                          weight,
                          input_size,
                          of(residual),
                          of(mask),
                          of(grad_mask),
                          {of(norm_weight), Tensor(), Tensor(), of(running_var), eps},
                          channels_last},
               Geometry(stride, padding, dilation, groups, backend));
}

}  // namespace freezekit
