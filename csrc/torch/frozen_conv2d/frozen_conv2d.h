// A convolution that is frozen, the batch norm with fixed statistics behind it, a residual, an activation.
//
//   y = act(conv(x, w) * scale + shift + residual),  act: none, relu, relu6
//   scale = gamma / sqrt(var + eps),  shift = beta + (b - mean) * scale;  without a norm 1 and b
//   dx = bits of the maker of x ? dgrad(bits ? dy * scale : 0, w) + what else flows to x : 0,  d residual = bits ? dy : 0
//
// Scale and shift are made from the norm's tensors at each call, and again in the backward pass: nothing is kept but one
// bit per element of y, and the parameters themselves. Bits are laid out as core/mask.h says, in the memory order in
// which the result is computed: NHWC by freezekit's kernels whatever the layout of the result, else that of the result.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

#include "torch/common/operators.h"

namespace freezekit {

constexpr float kRelu6End = 6;

struct FrozenConv2d {
  FrozenConv2d(std::string_view activation, Geometry);

  enum class Activation { none, relu, relu6 };

  Activation activation;
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

// The memory format of the result, whose size is given: that of torch's layers.
at::MemoryFormat result_format(const FrozenOperands&, SymIntArrayRef size);

// Whether torch's layers give their result these strides whatever they do in place and in whichever order they add. What
// they read tells where they do not: a residual in another layout, an activation on what is both NCHW and NHWC.
bool is_laid_out_as_by_layers(const FrozenOperands&, const FrozenConv2d&, SymIntArrayRef size);

// What stands for bits where there are none.
inline Tensor no_bits(const Tensor& like) { return at::empty({0}, like.options().dtype(at::kInt)); }

// (y, bits); bits are empty unless they are asked for and there is an activation.
std::tuple<Tensor, Tensor> frozen_conv2d(const FrozenOperands&, const FrozenConv2d&, bool keep_mask);

// (y, input): the input is handed on to its other readers, whose gradients this one's backward adds in its own dgrad.
std::tuple<Tensor, Tensor> frozen_conv2d_shared(const FrozenOperands&, const FrozenConv2d&);

// mask ? dgrad(grad_mask ? grad_output * scale : 0, weight) + residual : 0, where undefined masks are all set. Of the norm
// gamma and var are read. grad_mask is in grad_output's memory order, NCHW or NHWC; mask as said above.
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

// The strides by which bits are laid out.
std::vector<c10::SymInt> dense_stride(SymIntArrayRef size, bool channels_last);

// The operators' arguments, one by one in their schemas and bundled here.
struct FrozenCall {
  using Flat = Arguments<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
                         SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, c10::SymInt, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, std::string_view>;

  FrozenCall(const FrozenOperands& o, const FrozenConv2d& f) : o(o), f(f) {}
  FrozenCall(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
             std::string_view activation, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
             c10::SymInt groups, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
             const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
             std::string_view backend)
      : o{input,
          weight,
          tensor_of(bias),
          tensor_of(residual),
          {tensor_of(norm_weight), tensor_of(norm_bias), tensor_of(running_mean), tensor_of(running_var), eps}},
        f(activation, Geometry(stride, padding, dilation, groups, backend)) {}

  template <class F>
  auto apply(const F& call) const {
    const FixedNormTensors& n = o.norm;
    return f.geometry.apply(
        [&](const auto& stride, const auto& padding, const auto& dilation, const auto& groups, auto backend) {
          return call(o.input, o.weight, optional_of(o.bias), optional_of(o.residual), to_string(f.activation), stride,
                      padding, dilation, groups, optional_of(n.gamma), optional_of(n.beta), optional_of(n.mean),
                      optional_of(n.var), n.eps, backend);
        });
  }

  FrozenOperands o;
  FrozenConv2d f;
};

struct FrozenGradCall {
  using Flat = Arguments<const Tensor&, const Tensor&, SymIntArrayRef, const OptionalTensor&, const OptionalTensor&,
                         SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, c10::SymInt, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, double, bool, std::string_view>;

  FrozenGradCall(const FrozenGrad& o, const Geometry& g) : o(o), g(g) {}
  FrozenGradCall(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                 const OptionalTensor& residual, const OptionalTensor& mask, SymIntArrayRef stride,
                 SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups, const OptionalTensor& grad_mask,
                 const OptionalTensor& norm_weight, const OptionalTensor& running_var, double eps, bool channels_last,
                 std::string_view backend)
      : o{grad_output,
          weight,
          input_size,
          tensor_of(residual),
          tensor_of(mask),
          tensor_of(grad_mask),
          {tensor_of(norm_weight), Tensor(), Tensor(), tensor_of(running_var), eps},
          channels_last},
        g(stride, padding, dilation, groups, backend) {}

  template <class F>
  auto apply(const F& call) const {
    return g.apply(
        [&](const auto& stride, const auto& padding, const auto& dilation, const auto& groups, auto backend) {
          return call(o.grad_output, o.weight, o.input_size, optional_of(o.residual), optional_of(o.mask), stride,
                      padding, dilation, groups, optional_of(o.grad_mask), optional_of(o.norm.gamma),
                      optional_of(o.norm.var), o.norm.eps, o.channels_last, backend);
        });
  }

  FrozenGrad o;
  Geometry g;
};

using FrozenGradOperator = SettingsOperator<FrozenGradCall, Tensor()>;
using FrozenSharedOperator = SettingsOperator<FrozenCall, std::tuple<Tensor, Tensor>()>;

// The operator itself, which has keep_mask behind those arguments.
template <class Flat>
class FrozenConv2dOperator;

template <class... Flat>
class FrozenConv2dOperator<Arguments<Flat...>> {
 public:
  using Function = std::tuple<Tensor, Tensor> (*)(const FrozenOperands&, const FrozenConv2d&, bool keep_mask);

  static std::tuple<Tensor, Tensor> call(const FrozenCall& arguments, bool keep_mask) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(Flat..., bool)>("freezekit::frozen_conv2d");
    return arguments.apply([&](Flat... flat) { return op.call(flat..., keep_mask); });
  }

  template <Function kFunction>
  static std::tuple<Tensor, Tensor> kernel(Flat... flat, bool keep_mask) {
    const FrozenCall arguments(flat...);
    return kFunction(arguments.o, arguments.f, keep_mask);
  }
};
using FrozenOperator = FrozenConv2dOperator<FrozenCall::Flat>;

}  // namespace freezekit
