// Layers that are linear in their input: backward needs the input's size, and torch keeps the input.
//
//   avg_pool2d, avg_pool3d, adaptive_avg_pool2d, adaptive_avg_pool3d, reflection_pad, replication_pad
//
// Values and gradients are ATen's own operators. Its gradients ask for the input and read size and layout alone, so
// they get a tensor of the input's size without data.
#include "torch/linear_layers/linear_layers.h"

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
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "torch/autograd/formula.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit {
namespace {

void check_count(size_t given, std::initializer_list<size_t> allowed, const char* name) {
  TORCH_CHECK(std::find(allowed.begin(), allowed.end(), given) != allowed.end(), name, " has ", given,
              " numbers, which fits no layer of this kind");
}

// A layer: its settings, its value, and its gradient from one of its output and a stand-in for its input.
struct AvgPool {
  static constexpr Op kOp = Op::avg_pool;
  static constexpr const char* kName = "FreezekitAvgPoolBackward";
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, bool, std::optional<c10::SymInt>>;

  AvgPool() = default;
  AvgPool(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding, bool ceil_mode,
          bool count_include_pad, const std::optional<c10::SymInt>& divisor)
      : AvgPool(guarded(kernel_size), guarded(stride), guarded(padding), ceil_mode, count_include_pad,
                divisor ? std::make_optional(divisor->guard_int(__FILE__, __LINE__)) : std::nullopt) {}
  AvgPool(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
          std::optional<int64_t> divisor)
      : kernel_size(kernel_size.vec()), stride((stride.empty() ? kernel_size : stride).vec()), padding(padding.vec()),
        ceil_mode(ceil_mode), count_include_pad(count_include_pad), divisor(divisor) {
    check_count(kernel_size.size(), {2, 3}, "kernel_size");
  }

  auto fields() { return std::tie(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor); }

  Tensor value(const Tensor& x) const {
    const auto& pool = kernel_size.size() == 3 ? at::avg_pool3d : at::avg_pool2d;
    return pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor);
  }
  Tensor gradient(const Tensor& dy, const Tensor& x) const {
    const auto& backward = kernel_size.size() == 3 ? at::avg_pool3d_backward : at::avg_pool2d_backward;
    return backward(dy, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor);
  }

  // As torch's own pooling does with symbols: it has no operator for them.
  static std::vector<int64_t> guarded(SymIntArrayRef symbols) {
    std::vector<int64_t> numbers;
    for (const c10::SymInt& symbol : symbols) numbers.push_back(symbol.guard_int(__FILE__, __LINE__));
    return numbers;
  }

  std::vector<int64_t> kernel_size, stride, padding;
  bool ceil_mode = false, count_include_pad = true;
  std::optional<int64_t> divisor;
};

// Layers with one list of numbers, which may be symbolic.
struct OneList {
  using Flat = Arguments<SymIntArrayRef>;

  auto fields() { return std::tie(numbers); }

  std::vector<c10::SymInt> numbers;
};

struct AdaptiveAvgPool : OneList {
  static constexpr Op kOp = Op::adaptive_avg_pool;
  static constexpr const char* kName = "FreezekitAdaptiveAvgPoolBackward";

  AdaptiveAvgPool() = default;
  explicit AdaptiveAvgPool(SymIntArrayRef output_size) : OneList{owned(output_size)} {
    check_count(output_size.size(), {2, 3}, "output_size");
  }

  Tensor value(const Tensor& x) const {
    return numbers.size() == 3 ? at::adaptive_avg_pool3d_symint(x, numbers)
                               : at::adaptive_avg_pool2d_symint(x, numbers);
  }
  Tensor gradient(const Tensor& dy, const Tensor& x) const {
    return numbers.size() == 3 ? at::_adaptive_avg_pool3d_backward(dy, x) : at::_adaptive_avg_pool2d_backward(dy, x);
  }
};

// torch's pads over one axis, two and three.
struct Reflection {
  static constexpr Op kOp = Op::reflection_pad;
  static constexpr const char* kName = "FreezekitReflectionPadBackward";
  static constexpr std::array kValues = {at::reflection_pad1d_symint, at::reflection_pad2d_symint,
                                         at::reflection_pad3d_symint};
  static constexpr std::array kGradients = {at::reflection_pad1d_backward_symint, at::reflection_pad2d_backward_symint,
                                            at::reflection_pad3d_backward_symint};
};

struct Replication {
  static constexpr Op kOp = Op::replication_pad;
  static constexpr const char* kName = "FreezekitReplicationPadBackward";
  static constexpr std::array kValues = {at::replication_pad1d_symint, at::replication_pad2d_symint,
                                         at::replication_pad3d_symint};
  static constexpr std::array kGradients = {at::replication_pad1d_backward_symint,
                                            at::replication_pad2d_backward_symint,
                                            at::replication_pad3d_backward_symint};
};

template <class Mode>
struct Pad : OneList, Mode {
  Pad() = default;
  explicit Pad(SymIntArrayRef padding) : OneList{owned(padding)} {
    check_count(padding.size(), {2, 4, 6}, "padding");
    for (const auto& side : padding) {  // ATen adds them up unchecked: a replication that wraps around crashes
      const auto known = side.maybe_as_int();
      TORCH_CHECK(!known || (*known < kExtentLimit && *known > -kExtentLimit), "padding must be below ", kExtentLimit,
                  " either way, got ", padding);
    }
  }

  size_t axes() const { return numbers.size() / 2; }
  Tensor value(const Tensor& x) const { return Mode::kValues[axes() - 1](x, numbers); }
  Tensor gradient(const Tensor& dy, const Tensor& x) const { return Mode::kGradients[axes() - 1](dy, x, numbers); }
};
using ReflectionPad = Pad<Reflection>;
using ReplicationPad = Pad<Replication>;

template <class Layer>
struct LinearGradient {
  Layer layer;
  SizeVector input_size;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the input

  auto fields() { return std::tuple_cat(layer.fields(), std::tie(input_size, format)); }
  Link link() const { return {Link::To::operands, /*count=*/1, /*zeros=*/true}; }

  variable_list gradients(const Tensor& grad, Kept, const Wanted& wanted) const {
    if (!wanted[0]) return {Tensor()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor x = without_data(input_size, grad, format), dx = layer.gradient(grad, x);
    return {x.is_contiguous(format) ? dx : in_layout(dx, format)};  // a stand-in that is seen has no layout of its own
  }
};

template <class Layer>
using LinearOperator = SettingsOperator<Layer, Tensor(const Tensor& input)>;

template <class Layer>
Tensor by_aten(const Tensor& input, const Layer& layer) {
  return layer.value(input);
}

template <class Layer>
Tensor record(const Tensor& input, Layer layer) {
  if (route(Layer::kOp, Backend::automatic, input).computer == Computer::formula) return layer.value(input);
  LinearGradient<Layer> formula{std::move(layer), SizeVector(input.sym_sizes()), input.suggest_memory_format()};
  const Tensor y = below_autograd([&] { return formula.layer.value(input); });
  return with_history(y, formula_node(Layer::kName, std::move(formula), input));
}

template <class Layer>
Tensor autograd(const Tensor& input, const Layer& layer) {
  return record(input, layer);
}

}  // namespace

Tensor record_avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                       bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor) {
  return record(input, AvgPool(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor));
}

Tensor record_adaptive_avg_pool(const Tensor& input, SymIntArrayRef output_size) {
  return record(input, AdaptiveAvgPool(output_size));
}

Tensor record_reflection_pad(const Tensor& input, SymIntArrayRef padding) {
  return record(input, ReflectionPad(padding));
}

Tensor record_replication_pad(const Tensor& input, SymIntArrayRef padding) {
  return record(input, ReplicationPad(padding));
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "avg_pool(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool ceil_mode=False, "
      "bool count_include_pad=True, SymInt? divisor_override=None) -> Tensor",
      tags);
  m.def("adaptive_avg_pool(Tensor input, SymInt[] output_size) -> Tensor", tags);
  m.def("reflection_pad(Tensor input, SymInt[] padding) -> Tensor", tags);
  m.def("replication_pad(Tensor input, SymInt[] padding) -> Tensor", tags);
}

#define FREEZEKIT_LINEAR_LAYERS(m, f)                                                       \
  m.impl("avg_pool", LinearOperator<AvgPool>::kernel<f<AvgPool>>);                          \
  m.impl("adaptive_avg_pool", LinearOperator<AdaptiveAvgPool>::kernel<f<AdaptiveAvgPool>>); \
  m.impl("reflection_pad", LinearOperator<ReflectionPad>::kernel<f<ReflectionPad>>);        \
  m.impl("replication_pad", LinearOperator<ReplicationPad>::kernel<f<ReplicationPad>>)

TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { FREEZEKIT_LINEAR_LAYERS(m, by_aten); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { FREEZEKIT_LINEAR_LAYERS(m, by_aten); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { FREEZEKIT_LINEAR_LAYERS(m, autograd); }

#undef FREEZEKIT_LINEAR_LAYERS

}  // namespace freezekit
