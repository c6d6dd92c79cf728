// Max pools keep a byte per output element; average pools, reflection and replication pads keep sizes alone.
#include <ATen/core/Tensor.h>

#include "torch/common/checks.h"
#include "torch/enable/call.h"
#include "torch/enable/operator.h"
#include "torch/linear_layers/linear_layers.h"
#include "torch/max_pool2d/max_pool2d.h"
#include "torch/max_pool3d/max_pool3d.h"

namespace freezekit::enable {
namespace {

using Two = std::tuple<Tensor, Tensor>;

using MaxPool = Stock<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>;
using MaxPoolWithIndices = Stock<Two(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>;
using AvgPool = Stock<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool, bool, std::optional<int64_t>)>;
using Linear = Stock<Tensor(const Tensor&, SymIntArrayRef)>;

SymIntArrayRef symbols(IntArrayRef numbers) { return c10::fromIntArrayRefSlow(numbers); }

bool is_in_range(IntArrayRef numbers) {
  return std::all_of(numbers.begin(), numbers.end(),
                     [](int64_t number) { return number > -kExtentLimit && number < kExtentLimit; });
}

// Whether torch has no objection to a pooling over the last `axes` axes, and freezekit's takes its settings; a list of one
// number stands for all axes. Errors are torch's to word.
bool are_windows(const Tensor& x, int64_t axes, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                 IntArrayRef dilation) {
  const auto fits = [axes](IntArrayRef numbers) {
    return (numbers.size() == 1 || static_cast<int64_t>(numbers.size()) == axes) && is_in_range(numbers);
  };
  const int64_t first = x.dim() - axes;
  if (first < 1 || !fits(kernel_size) || !(stride.empty() || fits(stride)) || !fits(padding) || !fits(dilation)) {
    return false;
  }
  const auto extent = [&](int64_t axis) { return x.sym_size(axis).maybe_as_int().value_or(kExtentLimit); };
  if (extent(first - 1) < 1) return false;
  for (int64_t i = 0; i < axes; ++i) {
    const auto at = [i](IntArrayRef numbers) { return numbers[numbers.size() == 1 ? 0 : i]; };
    const int64_t kernel = at(kernel_size), pad = at(padding), reach = at(dilation) * (kernel - 1) + 1;
    const bool is_positive = kernel > 0 && at(dilation) > 0 && (stride.empty() || at(stride) > 0);
    const int64_t size = extent(first + i);
    if (!is_positive || pad < 0 || pad > reach / 2 || size < 1 || size + 2 * pad < reach) return false;
  }
  return true;
}

bool has_taps(const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  return x.dim() == 4 && are_windows(x, 2, kernel_size, stride, padding, dilation) && gains(Op::max_pool2d, x);
}

PoolGeometry geometry(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                      bool ceil_mode) {
  return {symbols(kernel_size), symbols(stride), symbols(padding), symbols(dilation), ceil_mode, "auto"};
}

std::optional<Tensor> max_pool1d(const MaxPool&, DispatchKeySet, const Tensor& x, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const bool is_served =
      x.dim() == 3 && are_windows(x, 1, kernel_size, stride, padding, dilation) && gains(Op::max_pool2d, x);
  if (!is_served) return {};
  return record_max_pool1d(x, PoolGeometry::of_rows(symbols(kernel_size), symbols(stride), symbols(padding),
                                                    symbols(dilation), ceil_mode, "auto"));
}

std::optional<Tensor> max_pool2d(const MaxPool&, DispatchKeySet, const Tensor& x, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  if (!has_taps(x, kernel_size, stride, padding, dilation)) return {};
  return record_max_pool2d(x, geometry(kernel_size, stride, padding, dilation, ceil_mode));
}

std::optional<Two> max_pool2d_with_indices(const MaxPoolWithIndices&, DispatchKeySet, const Tensor& x,
                                           IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                           IntArrayRef dilation, bool ceil_mode) {
  if (!makes_indices(x, Backend::automatic) || !has_taps(x, kernel_size, stride, padding, dilation)) return {};
  return record_max_pool2d_with_indices(x, geometry(kernel_size, stride, padding, dilation, ceil_mode));
}

// The settings of a pooling over volumes that freezekit's serves.
std::optional<Windows3d> windows(const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                 IntArrayRef dilation, bool ceil_mode) {
  if (!are_windows(x, 3, kernel_size, stride, padding, dilation) || !serves(Value::stock, x)) return std::nullopt;
  const Windows3d g(symbols(kernel_size), symbols(stride), symbols(padding), symbols(dilation), ceil_mode);
  return keeps_taps(x, g) ? std::optional(g) : std::nullopt;
}

std::optional<Tensor> max_pool3d(const MaxPool&, DispatchKeySet, const Tensor& x, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto g = windows(x, kernel_size, stride, padding, dilation, ceil_mode);
  return g ? std::optional(record_max_pool3d(x, *g)) : std::nullopt;
}

std::optional<Two> max_pool3d_with_indices(const MaxPoolWithIndices& op, DispatchKeySet keys, const Tensor& x,
                                           IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                           IntArrayRef dilation, bool ceil_mode) {
  const auto g = windows(x, kernel_size, stride, padding, dilation, ceil_mode);
  if (!g) return {};
  return record_max_pool3d_with_indices(
      x, *g, [&] { return op.forward(keys, x, kernel_size, stride, padding, dilation, ceil_mode); });
}

template <size_t kAxes>
std::optional<Tensor> avg_pool(const AvgPool&, DispatchKeySet, const Tensor& x, IntArrayRef kernel_size,
                               IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                               std::optional<int64_t> divisor_override) {
  if (kernel_size.size() != kAxes || !serves(Value::stock, x)) return {};
  return record_avg_pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
}

bool is_in_range(SymIntArrayRef numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](const c10::SymInt& number) {
    const auto known = number.maybe_as_int();
    return !known || (*known > -kExtentLimit && *known < kExtentLimit);
  });
}

constexpr char kAdaptiveAvgPool[] = "freezekit::adaptive_avg_pool", kReflectionPad[] = "freezekit::reflection_pad",
               kReplicationPad[] = "freezekit::replication_pad";

// freezekit's operator kOwn reads the number of axes from the count of `numbers`.
template <const char* kOwn, size_t kCount>
std::optional<Tensor> linear(const Linear&, DispatchKeySet keys, const Tensor& x, SymIntArrayRef numbers) {
  if (numbers.size() != kCount || !is_in_range(numbers) || !serves(Value::stock, x)) return {};
  static const auto own = find_operator<Tensor(const Tensor&, SymIntArrayRef)>(kOwn);
  return own.redispatch(keys, x, numbers);
}

// To one place it is a mean, elsewhere computed: a call of the operator below for that means this very operator.
bool is_mean(SymIntArrayRef output_size) {
  return std::all_of(output_size.begin(), output_size.end(), [](const auto& size) { return size.maybe_as_int() == 1; });
}

template <size_t kAxes>
std::optional<Tensor> adaptive_avg_pool(const Linear& op, DispatchKeySet keys, const Tensor& x,
                                        SymIntArrayRef output_size) {
  if (is_mean(output_size)) return {};
  return linear<kAdaptiveAvgPool, kAxes>(op, keys, x, output_size);
}

StandIn<max_pool1d, Unrecorded::below_if_unseen> of_max_pool1d("max_pool1d", "max_pool2d_with_indices");
StandIn<max_pool2d, Unrecorded::below_if_unseen> of_max_pool2d("max_pool2d", "max_pool2d_with_indices");
StandIn<max_pool3d, Unrecorded::below_if_unseen> of_max_pool3d("max_pool3d", "max_pool3d_with_indices");
StandIn<max_pool2d_with_indices> of_max_pool2d_indices("max_pool2d_with_indices", "max_pool2d_with_indices");
StandIn<max_pool3d_with_indices> of_max_pool3d_indices("max_pool3d_with_indices");
StandIn<avg_pool<2>> of_avg_pool2d("avg_pool2d");
StandIn<avg_pool<3>> of_avg_pool3d("avg_pool3d");
StandIn<adaptive_avg_pool<2>> of_adaptive_avg_pool2d("_adaptive_avg_pool2d");
StandIn<adaptive_avg_pool<3>> of_adaptive_avg_pool3d("_adaptive_avg_pool3d");
StandIn<linear<kReflectionPad, 2>> of_reflection_pad1d("reflection_pad1d");
StandIn<linear<kReflectionPad, 4>> of_reflection_pad2d("reflection_pad2d");
StandIn<linear<kReflectionPad, 6>> of_reflection_pad3d("reflection_pad3d");
StandIn<linear<kReplicationPad, 2>> of_replication_pad1d("replication_pad1d");
StandIn<linear<kReplicationPad, 4>> of_replication_pad2d("replication_pad2d");
StandIn<linear<kReplicationPad, 6>> of_replication_pad3d("replication_pad3d");

}  // namespace
}  // namespace freezekit::enable
