// Autograd of max pooling: scatter and gather by the same taps are each other's derivative.
//
//   max_pool2d(input, ...)               torch's value; its node keeps taps where torch keeps input and int64 indices
//   max_pool2d_with_indices(input, ...)  the same, and torch's indices, which only the caller keeps
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/bits/gate.h"
#include "torch/max_pool2d/max_pool2d.h"

namespace freezekit {
namespace {

Settings settings_of(const PoolGeometry& g, SymIntArrayRef input_size) {
  return {{IntArrayRef(g.kernel_size), IntArrayRef(g.stride), IntArrayRef(g.padding), IntArrayRef(g.dilation),
           g.ceil_mode, g.backend},
          {owned(input_size)}};
}

PoolGeometry geometry_of(const Settings& settings) {
  const auto& v = settings.values;
  return {v[0].toIntVector(), v[1].toIntVector(), v[2].toIntVector(), v[3].toIntVector(), v[4].toBool(),
          v[5].toStringRef()};
}

// Of the pooling itself and of the gather: the gradient scatters.
variable_list scatter_gradient(const Tensor& grad, const variable_list& kept, const Settings& settings,
                               const std::vector<bool>& wanted) {
  if (!wanted[0]) return {Tensor()};
  return {max_pool2d_scatter(grad, kept[0], settings.sizes[0], geometry_of(settings))};
}

variable_list gather_gradient(const Tensor& grad, const variable_list& kept, const Settings& settings,
                              const std::vector<bool>& wanted) {
  if (!wanted[0]) return {Tensor()};
  return {max_pool2d_gather(grad, kept[0], geometry_of(settings))};
}

template <Formula kFormula, class Compute>
Tensor record(const char* name, const PoolGeometry& g, SymIntArrayRef input_size, const Tensor& input,
              const Tensor& taps, Compute compute) {
  const auto node = formula_node<kFormula>(name, settings_of(g, input_size), input);
  if (node) node->keep({taps});
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }();
  if (node) torch::autograd::set_history(result, node);
  return result;
}

std::pair<Tensor, Tensor> pool_and_record(const Tensor& input, const PoolGeometry& g) {
  auto [result, taps] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return max_pool2d_taps(input, g);
  }();
  const auto node =
      formula_node<scatter_gradient>("FreezekitMaxPool2dBackward", settings_of(g, input.sym_sizes()), input);
  if (!node) return {result, taps};
  node->keep({taps});
  torch::autograd::set_history(result, node);
  return {result, taps};
}

Tensor pool_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, bool ceil_mode, std::string_view backend) {
  if (input.dim() != 4 || is_aten_s(input, backend)) {
    return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return pool_and_record(input, {kernel_size, stride, padding, dilation, ceil_mode, backend}).first;
}

Tensor pool_aten(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                 IntArrayRef dilation, bool ceil_mode, std::string_view) {
  return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
}

Tensor pool_batched(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                    IntArrayRef dilation, bool ceil_mode, std::string_view backend) {
  check_aten_is_allowed(backend);
  return pool_aten(input, kernel_size, stride, padding, dilation, ceil_mode, backend);
}

// Without autograd: in inference mode, and below other transforms.
Tensor pool_plain(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                  IntArrayRef dilation, bool ceil_mode, std::string_view backend) {
  if (input.dim() != 4 || !is_own(parse_backend(backend))) {
    return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return std::get<0>(max_pool2d_taps(input, {kernel_size, stride, padding, dilation, ceil_mode, backend}));
}

std::tuple<Tensor, Tensor> indices_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                            IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                            std::string_view backend) {
  if (input.dim() != 4 || is_aten_s(input, backend)) {
    return at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  const auto [result, taps] = pool_and_record(input, g);
  return {result, max_pool2d_indices(taps, input.sym_sizes(), g)};
}

std::tuple<Tensor, Tensor> indices_aten(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                        IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, std::string_view) {
  return at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
}

std::tuple<Tensor, Tensor> indices_batched(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                           IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                           std::string_view backend) {
  check_aten_is_allowed(backend);
  return indices_aten(input, kernel_size, stride, padding, dilation, ceil_mode, backend);
}

Tensor scatter_autograd(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                        IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        bool ceil_mode, std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  return record<gather_gradient>("FreezekitMaxPool2dScatterBackward", g, input_size, grad_output, taps,
                                 [&] { return max_pool2d_scatter(grad_output, taps, input_size, g); });
}

Tensor gather_autograd(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                       std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  return record<scatter_gradient>("FreezekitMaxPool2dGatherBackward", g, input_size, input, taps,
                                  [&] { return max_pool2d_gather(input, taps, g); });
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False, *, str backend=\"auto\") -> Tensor",
      tags);
  m.def(
      "max_pool2d_with_indices(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False, *, str backend=\"auto\") -> (Tensor, Tensor)",
      tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d", freezekit::pool_plain);
  m.impl("max_pool2d_with_indices", freezekit::indices_aten);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("max_pool2d", freezekit::pool_autograd);
  m.impl("max_pool2d_with_indices", freezekit::indices_autograd);
  m.impl("max_pool2d_scatter", freezekit::scatter_autograd);
  m.impl("max_pool2d_gather", freezekit::gather_autograd);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) {
  m.impl("max_pool2d", freezekit::pool_batched);
  m.impl("max_pool2d_with_indices", freezekit::indices_batched);
}
