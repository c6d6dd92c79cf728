// Convolutions of any number of dimensions, and transposed ones, by ATen; conv2d has operators of its own.
//
// What the node keeps is what conv2d's keeps: x only for wgrad, w only for dgrad, nothing for the gradient of the bias.
#include "torch/conv_nd/conv_nd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/backends/route.h"
#include "torch/common/autocast.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

using ConvNdOperator =
    SettingsOperator<ConvNdGeometry, Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias)>;

Tensor bias_gradient(const Tensor& dy) {
  std::vector<int64_t> dims = {0};
  for (int64_t i = 2; i < dy.dim(); ++i) dims.push_back(i);
  return dy.sum(dims);
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
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto [dx, dw, db] = aten::gradients(grad, input, weight, wanted[2], geometry);
      return {dx, dw, db};
    }
    variable_list result(wanted.size());
    if (wanted[0]) result[0] = aten::dgrad(grad, weight, input_size, format, geometry);
    if (wanted[1]) result[1] = aten::wgrad(grad, input, weight_size, weight_format, geometry);
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

Tensor convolution_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const ConvNdGeometry& g) {
  static const ConvNdOperator op("freezekit::convolution");
  const Autocast cast(input);
  return op(cast(input), cast(weight), cast(bias), g);
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
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) { m.impl("convolution", ConvNdOperator::kernel<convolution_autocast>); }
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) { m.impl("convolution", ConvNdOperator::kernel<convolution_autocast>); }

}  // namespace freezekit
