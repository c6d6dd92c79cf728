// Layers that are linear in their input: backward needs the input's size, and torch keeps the input.
//
//   avg_pool2d, avg_pool3d, adaptive_avg_pool2d, adaptive_avg_pool3d, reflection_pad, replication_pad
//
// Values and gradients are ATen's own operators. Its gradients ask for the input and read size and layout alone, so
// they get a tensor of the input's size without data.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/adaptive_avg_pool3d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/avg_pool3d_backward.h>
#include <ATen/ops/reflection_pad1d.h>
#include <ATen/ops/reflection_pad1d_backward.h>
#include <ATen/ops/reflection_pad2d.h>
#include <ATen/ops/reflection_pad2d_backward.h>
#include <ATen/ops/reflection_pad3d.h>
#include <ATen/ops/reflection_pad3d_backward.h>
#include <ATen/ops/replication_pad1d.h>
#include <ATen/ops/replication_pad1d_backward.h>
#include <ATen/ops/replication_pad2d.h>
#include <ATen/ops/replication_pad2d_backward.h>
#include <ATen/ops/replication_pad3d.h>
#include <ATen/ops/replication_pad3d_backward.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/common/checks.h"
#include "torch/autograd/formula.h"
#include "torch/common/layout.h"
#include "torch/common/operators.h"
#include "torch/common/shape_only.h"

namespace freezekit {
namespace {

using c10::IValue;

// A layer: its value, and its gradient from one of its output and a stand-in for its input. `settings` has its
// arguments in the order of the schema, padding aside, which may be symbolic.
struct AvgPool {
  static constexpr const char* name = "FreezekitAvgPoolBackward";
  static std::optional<int64_t> divisor(const Settings& s) { return s.values[5].toOptional<int64_t>(); }

  static Tensor value(const Tensor& x, const Settings& s) {
    const auto& v = s.values;
    const auto kernel = v[0].toIntVector(), stride = v[1].toIntVector(), padding = v[2].toIntVector();
    return kernel.size() == 3 ? at::avg_pool3d(x, kernel, stride, padding, v[3].toBool(), v[4].toBool(), divisor(s))
                              : at::avg_pool2d(x, kernel, stride, padding, v[3].toBool(), v[4].toBool(), divisor(s));
  }
  static Tensor gradient(const Tensor& dy, const Tensor& x, const Settings& s) {
    const auto& v = s.values;
    const auto kernel = v[0].toIntVector(), stride = v[1].toIntVector(), padding = v[2].toIntVector();
    return kernel.size() == 3
               ? at::avg_pool3d_backward(dy, x, kernel, stride, padding, v[3].toBool(), v[4].toBool(), divisor(s))
               : at::avg_pool2d_backward(dy, x, kernel, stride, padding, v[3].toBool(), v[4].toBool(), divisor(s));
  }
};

struct AdaptiveAvgPool {
  static constexpr const char* name = "FreezekitAdaptiveAvgPoolBackward";

  static Tensor value(const Tensor& x, const Settings& s) {
    const auto& size = s.sizes[0];
    return size.size() == 3 ? at::adaptive_avg_pool3d_symint(x, size) : at::adaptive_avg_pool2d_symint(x, size);
  }
  static Tensor gradient(const Tensor& dy, const Tensor& x, const Settings& s) {
    return s.sizes[0].size() == 3 ? at::_adaptive_avg_pool3d_backward(dy, x) : at::_adaptive_avg_pool2d_backward(dy, x);
  }
};

struct ReflectionPad {
  static constexpr const char* name = "FreezekitReflectionPadBackward";

  static Tensor value(const Tensor& x, const Settings& s) {
    const auto& pad = s.sizes[0];
    if (pad.size() == 2) return at::reflection_pad1d_symint(x, pad);
    return pad.size() == 4 ? at::reflection_pad2d_symint(x, pad) : at::reflection_pad3d_symint(x, pad);
  }
  static Tensor gradient(const Tensor& dy, const Tensor& x, const Settings& s) {
    const auto& pad = s.sizes[0];
    if (pad.size() == 2) return at::reflection_pad1d_backward_symint(dy, x, pad);
    return pad.size() == 4 ? at::reflection_pad2d_backward_symint(dy, x, pad)
                           : at::reflection_pad3d_backward_symint(dy, x, pad);
  }
};

struct ReplicationPad {
  static constexpr const char* name = "FreezekitReplicationPadBackward";

  static Tensor value(const Tensor& x, const Settings& s) {
    const auto& pad = s.sizes[0];
    if (pad.size() == 2) return at::replication_pad1d_symint(x, pad);
    return pad.size() == 4 ? at::replication_pad2d_symint(x, pad) : at::replication_pad3d_symint(x, pad);
  }
  static Tensor gradient(const Tensor& dy, const Tensor& x, const Settings& s) {
    const auto& pad = s.sizes[0];
    if (pad.size() == 2) return at::replication_pad1d_backward_symint(dy, x, pad);
    return pad.size() == 4 ? at::replication_pad2d_backward_symint(dy, x, pad)
                           : at::replication_pad3d_backward_symint(dy, x, pad);
  }
};

// sizes: what the layer has, then the input's size; the last value is the input's memory format.
template <class Layer>
variable_list backward(const Tensor& grad, const variable_list&, const Settings& settings,
                       const std::vector<bool>& wanted) {
  if (!wanted[0]) return {Tensor()};
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto& size = settings.sizes.back();
  const auto format = static_cast<at::MemoryFormat>(settings.values.back().toInt());
  return {in_layout(Layer::gradient(grad, without_data(size, grad, format), settings), format)};
}

template <class Layer>
Tensor forward(const Tensor& input, Settings settings) {
  if (needs_aten(input) || !torch::autograd::compute_requires_grad(input)) return Layer::value(input, settings);
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return Layer::value(input, settings);
  }();
  settings.values.emplace_back(static_cast<int64_t>(input.suggest_memory_format()));
  settings.sizes.push_back(owned(input.sym_sizes()));
  torch::autograd::set_history(result, formula_node<backward<Layer>>(Layer::name, std::move(settings), input));
  return result;
}

IValue or_none(std::optional<int64_t> value) { return value ? IValue(*value) : IValue(); }

void check_count(size_t given, std::initializer_list<size_t> allowed, const char* name) {
  TORCH_CHECK(std::find(allowed.begin(), allowed.end(), given) != allowed.end(), name, " has ", given,
              " numbers, which fits no layer of this kind");
}

Settings avg_pool_settings(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                           bool count_include_pad, std::optional<int64_t> divisor_override) {
  check_count(kernel_size.size(), {2, 3}, "kernel_size");
  return {{kernel_size, stride.empty() ? kernel_size : stride, padding, ceil_mode, count_include_pad,
           or_none(divisor_override)},
          {}};
}

Settings pad_settings(SymIntArrayRef padding) {
  check_count(padding.size(), {2, 4, 6}, "padding");
  for (const auto& side : padding) {  // ATen adds them up unchecked: a replication that wraps around crashes
    const auto known = side.maybe_as_int();
    TORCH_CHECK(!known || (*known < kExtentLimit && *known > -kExtentLimit), "padding must be below ", kExtentLimit,
                " either way, got ", padding);
  }
  return {{}, {owned(padding)}};
}

Settings adaptive_settings(SymIntArrayRef output_size) {
  check_count(output_size.size(), {2, 3}, "output_size");
  return {{}, {owned(output_size)}};
}

Tensor avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                bool count_include_pad, std::optional<int64_t> divisor_override) {
  return forward<AvgPool>(
      input, avg_pool_settings(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override));
}

Tensor avg_pool_aten(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                     bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  return AvgPool::value(
      input, avg_pool_settings(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override));
}

Tensor adaptive_avg_pool(const Tensor& input, SymIntArrayRef output_size) {
  return forward<AdaptiveAvgPool>(input, adaptive_settings(output_size));
}
Tensor adaptive_avg_pool_aten(const Tensor& input, SymIntArrayRef output_size) {
  return AdaptiveAvgPool::value(input, adaptive_settings(output_size));
}

template <class Layer>
Tensor pad(const Tensor& input, SymIntArrayRef padding) {
  return forward<Layer>(input, pad_settings(padding));
}
template <class Layer>
Tensor pad_aten(const Tensor& input, SymIntArrayRef padding) {
  return Layer::value(input, pad_settings(padding));
}

}  // namespace
}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "avg_pool(Tensor input, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode=False, "
      "bool count_include_pad=True, int? divisor_override=None) -> Tensor",
      tags);
  m.def("adaptive_avg_pool(Tensor input, SymInt[] output_size) -> Tensor", tags);
  m.def("reflection_pad(Tensor input, SymInt[] padding) -> Tensor", tags);
  m.def("replication_pad(Tensor input, SymInt[] padding) -> Tensor", tags);
}

#define FREEZEKIT_ATEN_KERNELS(m)                                          \
  m.impl("avg_pool", freezekit::avg_pool_aten);                            \
  m.impl("adaptive_avg_pool", freezekit::adaptive_avg_pool_aten);          \
  m.impl("reflection_pad", freezekit::pad_aten<freezekit::ReflectionPad>); \
  m.impl("replication_pad", freezekit::pad_aten<freezekit::ReplicationPad>)

TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { FREEZEKIT_ATEN_KERNELS(m); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) {
  m.impl("avg_pool", freezekit::avg_pool);
  m.impl("adaptive_avg_pool", freezekit::adaptive_avg_pool);
  m.impl("reflection_pad", freezekit::pad<freezekit::ReflectionPad>);
  m.impl("replication_pad", freezekit::pad<freezekit::ReplicationPad>);
}
