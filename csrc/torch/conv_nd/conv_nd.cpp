// Convolutions of any number of dimensions, and transposed ones, by ATen; conv2d has operators of its own.
//
// What the node keeps is what conv2d's keeps: x only for wgrad, w only for dgrad, nothing for the gradient of the bias.
#include "torch/conv_nd/conv_nd.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/backends/aten.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/route.h"
#include "torch/common/shape_only.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

using OptionalTensor = std::optional<Tensor>;

using ConvNdOperator =
    SettingsOperator<ConvNdGeometry, Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias)>;

// dx of y = conv(x, w): as in backends/aten.cpp, ATen's own gradient where that is what stock runs and needs no x, else the
// transposed convolution, or the plain one of a transposed one. The transposed convolution ends where the last window
// does: output_padding restores what is beyond. A transposed convolution's own output_padding can make its dgrad longer
// than x: what is past its end is cut, and the rest is copied, since torch's gradient is dense.
Tensor dgrad(const Tensor& dy, const Tensor& weight, SymIntArrayRef input_size, at::MemoryFormat format,
             ConvNdGeometry g) {
  if (is_plain_on_cpu(dy) && is_plain_on_cpu(weight)) {
    const Tensor x = shape_only(input_size, dy, format);
    return std::get<0>(at::convolution_backward_symint(dy, x, weight, /*bias_sizes=*/std::nullopt, g.stride, g.padding,
                                                       g.dilation, g.transposed, g.output_padding, g.groups,
                                                       {true, false, false}));
  }
  if (!g.transposed) {
    const Tensor dx = aten::depthwise_dgrad(dy, weight, input_size, format, g.stride, g.padding, g.dilation, g.groups);
    if (dx.defined()) return dx;
  }
  const int64_t axes = dy.dim() - 2;
  for (int64_t i = 0; i < axes; ++i) {
    const auto reached =
        (dy.sym_size(2 + i) - 1) * g.stride[i] - g.padding[i] * 2 + g.dilation[i] * (weight.sym_size(2 + i) - 1) + 1;
    g.output_padding[i] = g.transposed ? c10::SymInt(0) : input_size[2 + i] - reached;
  }
  g.transposed = !g.transposed;
  Tensor dx = g.convolution(dy, weight, {});
  for (int64_t i = 0; i < axes; ++i) {
    if (dx.sym_size(2 + i) != input_size[2 + i]) dx = dx.narrow_symint(2 + i, 0, input_size[2 + i]);
  }
  return in_layout(dx, format);
}

// ATen's interface wants a weight for its size and layout.
Tensor wgrad(const Tensor& dy, const Tensor& input, SymIntArrayRef weight_size, at::MemoryFormat format,
             const ConvNdGeometry& g) {
  const Tensor weight = shape_only(weight_size, dy, format);
  return std::get<1>(at::convolution_backward_symint(dy, input, weight, std::nullopt, g.stride, g.padding, g.dilation,
                                                     g.transposed, g.output_padding, g.groups, {false, true, false}));
}

Tensor bias_gradient(const Tensor& dy) {
  std::vector<int64_t> dims = {0};
  for (int64_t i = 2; i < dy.dim(); ++i) dims.push_back(i);
  return dy.sum(dims);
}

// As torch's own node has them, where nothing looks on.
std::tuple<Tensor, Tensor, Tensor> all_in_one(const Tensor& dy, const Tensor& input, const Tensor& weight, bool of_bias,
                                              const ConvNdGeometry& g) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::SymInt filters = dy.sym_size(1);
  return at::convolution_backward_symint(
      dy, input, weight, of_bias ? at::OptionalSymIntArrayRef(filters) : std::nullopt, g.stride, g.padding, g.dilation,
      g.transposed, g.output_padding, g.groups, {true, true, of_bias});
}

void check_device(const Tensor& input, const Tensor& other, const char* name) {
  TORCH_CHECK(input.device() == other.device(), "input is on ", input.device(), ", ", name, " is on ", other.device(),
              ": both must be on one device");
}

// ATen reads tensors on the meta device as if they had data, and forms products of sizes unchecked. at::conv1d and
// at::conv3d refuse a bias of another dtype; at::convolution, below them and used here, does not.
void check_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvNdGeometry& g) {
  check_device(input, weight, "weight");
  if (bias && bias->defined()) {
    check_device(input, *bias, "bias");
    if (!g.transposed) check_same(input, "input", *bias, "bias");
  }
  for (const Numbers* setting : {&g.stride, &g.padding, &g.dilation, &g.output_padding}) {
    for (const auto& number : *setting) {
      const auto known = number.maybe_as_int();
      TORCH_CHECK(!known || *known < kExtentLimit, "stride, padding, dilation and output_padding must be below ",
                  kExtentLimit, ", got ", SymIntArrayRef(*setting));
    }
  }
}

struct ConvNdGradients {
  ConvNdGeometry geometry;
  Numbers input_size, weight_size;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the result, so of dx
  at::MemoryFormat weight_format = at::MemoryFormat::Contiguous;

  auto fields() {
    ConvNdGeometry& g = geometry;
    return std::tie(g.stride, g.padding, g.dilation, g.output_padding, g.transposed, g.groups, input_size, weight_size,
                    format, weight_format);
  }
  Link link() const { return {Link::To::operands, /*count=*/2}; }

  // A backward pass that happens to run inside an autocast region keeps the dtype of its forward pass, as torch's does.
  variable_list gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    // Once each: checkpoints refuse a second time.
    const Tensor input = wanted[1] ? kept(0) : Tensor(), weight = wanted[0] ? kept(1) : Tensor();
    if (wanted[0] && wanted[1] && reaches_kernel(grad, input, weight)) {
      const auto [dx, dw, db] = all_in_one(grad, input, weight, wanted[2], geometry);
      return {dx, dw, db};
    }
    variable_list result(wanted.size());
    if (wanted[0]) result[0] = dgrad(grad, weight, input_size, format, geometry);
    if (wanted[1]) result[1] = wgrad(grad, input, weight_size, weight_format, geometry);
    if (wanted[2]) result[2] = bias_gradient(grad);
    return result;
  }
};

}  // namespace

Tensor record_convolution(const Tensor& input, const Tensor& weight, const Tensor& bias, const ConvNdGeometry& g,
                          c10::function_ref<Tensor()> compute) {
  ConvNdGradients gradients{g, owned(input.sym_sizes()), owned(weight.sym_sizes()), layout_of(input, weight),
                            weight.suggest_memory_format()};
  const auto node = formula_node("FreezekitConvolutionBackward", std::move(gradients), input, weight, bias);
  node->keep(weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor());
  return recorded(node, compute);
}

Tensor record_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const ConvNdGeometry& g) {
  check_convolution(input, weight, bias, g);
  const Tensor b = bias.value_or(Tensor());
  if (is_empty(input) || route(Op::convolution, Backend::automatic, input, weight, b).computer == Computer::formula) {
    return g.convolution(input, weight, bias);
  }
  return record_convolution(input, weight, b, g, [&] { return g.convolution(input, weight, bias); });
}

namespace {

Tensor convolution_aten(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const ConvNdGeometry& g) {
  check_convolution(input, weight, bias, g);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return g.convolution(input, weight, bias);
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
Tensor convolution_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const ConvNdGeometry& g) {
  static const ConvNdOperator op("freezekit::convolution");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [dtype](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kDevice); };
  return op(cast(input), cast(weight), bias ? std::make_optional(cast(*bias)) : std::nullopt, g);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("convolution", ConvNdOperator::kernel<convolution_aten>);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("convolution", ConvNdOperator::kernel<convolution_aten>); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { m.impl("convolution", ConvNdOperator::kernel<record_convolution>); }
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) {
  m.impl("convolution",
         ConvNdOperator::kernel<convolution_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>);
}
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) {
  m.impl("convolution",
         ConvNdOperator::kernel<convolution_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>);
}

}  // namespace freezekit
