// Max pooling in three dimensions. ATen computes value and gradient, by int64 indices (d * H + h) * W + w; what is kept
// from one to the other is a tap per output, its place in the window.
//
//   max_pool3d(input, ...)               torch's value; its node keeps taps where torch keeps input and indices
//   max_pool3d_with_indices(input, ...)  the same, and torch's indices, which only the caller keeps
#include "torch/max_pool3d/max_pool3d.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool3d.h>
#include <ATen/ops/max_pool3d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices_backward.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "torch/autograd/formula.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/route.h"
#include "torch/common/shape_only.h"

namespace freezekit {
namespace {

using Place = std::array<int64_t, 3>;
using Pair = std::tuple<Tensor, Tensor>;

constexpr int64_t kRowsPerTask = 64;

std::vector<int64_t> triple(SymIntArrayRef values, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 3, name,
              " must be one number or three (depth, height, width), got ", values.size(), " of them: ", values);
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < 3; ++i) {
    numbers.push_back(values[values.size() == 1 ? 0 : i].guard_int(__FILE__, __LINE__));
    // torch's own checks refuse what is negative, after sums that would overflow.
    TORCH_CHECK(numbers[i] < kExtentLimit && numbers[i] > -kExtentLimit, name, " must be below ", kExtentLimit,
                " either way, got ", values);
  }
  return numbers;
}

Pair by_aten(const Tensor& x, const Windows3d& g) {
  return at::max_pool3d_with_indices(x, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
}

// Calls f(i, place where the window begins) for each of `outputs` (N, C, O, P, Q), whose i-th element in memory it is.
template <class F>
void for_each_output(const Tensor& outputs, at::MemoryFormat format, const Windows3d& g, const F& f) {
  const bool last = format == at::MemoryFormat::ChannelsLast3d;
  const int64_t n = outputs.size(0), c = outputs.size(1), o = outputs.size(2), p = outputs.size(3), q = outputs.size(4);
  const int64_t inner = last ? c : 1;
  at::parallel_for(0, (last ? n : n * c) * o * p, kRowsPerTask, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      Place origin = {row / p % o * g.stride[0] - g.padding[0], row % p * g.stride[1] - g.padding[1], -g.padding[2]};
      int64_t i = row * q * inner;
      for (int64_t column = 0; column < q; ++column, origin[2] += g.stride[2]) {
        for (int64_t channel = 0; channel < inner; ++channel) f(i++, origin);
      }
    }
  });
}

template <class F>
void for_tap_type(at::ScalarType type, const F& f) {
  if (type == at::kByte) return f(uint8_t());
  if (type == at::kShort) return f(int16_t());
  f(int32_t());
}

// Which tap along an axis reads `place`. Where nothing exceeds -inf, ATen's NHWC kernel on a CPU puts indices in the first
// plane, window or not; rounding up and clamping makes that the window's first tap inside the input, as elsewhere.
int64_t tap_along(size_t axis, int64_t place, int64_t origin, const Windows3d& g) {
  const int64_t dilation = g.dilation[axis];
  return std::clamp<int64_t>((place - origin + dilation - 1) / dilation, 0, g.kernel_size[axis] - 1);
}

Tensor taps_on_cpu(const Tensor& given, IntArrayRef input_size, const Windows3d& g) {
  const auto format = given.suggest_memory_format();
  const Tensor indices = given.contiguous(format);
  const Tensor taps = at::empty_like(indices, indices.options().dtype(g.tap_type()));
  const int64_t* from = indices.const_data_ptr<int64_t>();
  const int64_t h = input_size[3], w = input_size[4];
  for_tap_type(g.tap_type(), [&](auto tap) {
    auto* to = static_cast<decltype(tap)*>(taps.mutable_data_ptr());
    for_each_output(taps, format, g, [&](int64_t i, const Place& origin) {
      const int64_t row = from[i] / w;
      const Place place = {row / h, row % h, from[i] % w};
      int64_t found = 0;
      for (size_t axis = 0; axis < 3; ++axis) {
        found = found * g.kernel_size[axis] + tap_along(axis, place[axis], origin[axis], g);
      }
      to[i] = static_cast<decltype(tap)>(found);
    });
  });
  return taps;
}

// Indices of taps, and whether each lies inside the input: a dilated window can miss it.
std::pair<Tensor, Tensor> indices_on_cpu(const Tensor& given, IntArrayRef input_size, const Windows3d& g) {
  const auto format = given.suggest_memory_format();
  const Tensor taps = given.contiguous(format);
  const Tensor indices = at::empty_like(taps, taps.options().dtype(at::kLong));
  const Tensor inside = at::empty_like(taps, taps.options().dtype(at::kBool));
  auto* to = indices.mutable_data_ptr<int64_t>();
  bool* in = inside.mutable_data_ptr<bool>();
  for_tap_type(taps.scalar_type(), [&](auto tap) {
    const auto* from = static_cast<const decltype(tap)*>(taps.const_data_ptr());
    for_each_output(taps, format, g, [&](int64_t i, const Place& origin) {
      int64_t rest = from[i], index = 0, step = 1;
      bool is_inside = true;
      for (int axis = 2; axis >= 0; --axis) {
        const int64_t extent = input_size[2 + axis], kernel = g.kernel_size[axis];
        const int64_t place = origin[axis] + rest % kernel * g.dilation[axis];
        is_inside = is_inside && place >= 0 && place < extent;
        rest /= kernel;
        index += place * step;
        step *= extent;
      }
      in[i] = is_inside;
      to[i] = is_inside ? index : 0;
    });
  });
  return {indices, inside};
}

// Where each output's window begins along an axis, to be broadcast against (..., O, P, Q).
Tensor origins(const Tensor& outputs, int axis, const Windows3d& g) {
  const Tensor number = at::arange(outputs.sym_size(2 + axis), outputs.options().dtype(at::kLong));
  Tensor result = number.mul(g.stride[axis]).sub(g.padding[axis]);
  for (int i = axis; i < 2; ++i) result = result.unsqueeze(-1);
  return result;
}

Tensor taps_of(const Tensor& indices, SymIntArrayRef input_size, const Windows3d& g) {
  if (is_plain_on_cpu(indices)) return taps_on_cpu(indices, C10_AS_INTARRAYREF_SLOW(input_size), g);
  Tensor rest = indices, taps;
  int64_t step = 1;
  for (int axis = 2; axis >= 0; --axis) {
    const Tensor place = axis > 0 ? rest.remainder(input_size[2 + axis]) : rest;
    const Tensor offset = place.sub(origins(indices, axis, g)).add(g.dilation[axis] - 1).div(g.dilation[axis], "floor");
    const Tensor tap = offset.clamp(0, g.kernel_size[axis] - 1).mul(step);
    taps = taps.defined() ? taps.add(tap) : tap;
    rest = rest.div(input_size[2 + axis], "floor");
    step *= g.kernel_size[axis];
  }
  return taps.to(g.tap_type());
}

std::pair<Tensor, Tensor> indices_of(const Tensor& taps, SymIntArrayRef input_size, const Windows3d& g) {
  if (is_plain_on_cpu(taps)) return indices_on_cpu(taps, C10_AS_INTARRAYREF_SLOW(input_size), g);
  Tensor rest = taps.to(at::kLong), indices, inside;
  c10::SymInt step = 1;
  for (int axis = 2; axis >= 0; --axis) {
    const c10::SymInt extent = input_size[2 + axis];
    const Tensor place = rest.remainder(g.kernel_size[axis]).mul(g.dilation[axis]).add(origins(taps, axis, g));
    const Tensor here = place.ge(0).logical_and(place.lt(extent));
    inside = inside.defined() ? inside.logical_and(here) : here;
    indices = indices.defined() ? indices.add(place.mul(step)) : place;
    rest = rest.div(g.kernel_size[axis], "floor");
    step *= extent;
  }
  return {at::where(inside, indices, 0), inside};
}

// A batch of one, of what has none.
Tensor in_batch(const Tensor& tensor, bool is_batch) { return is_batch ? tensor : tensor.unsqueeze(0); }

struct PoolGradient3d {
  Windows3d windows;
  bool is_batch = true;                                    // else the input is one volume
  std::vector<c10::SymInt> input_size;                     // (N, C, D, H, W)
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the input

  auto fields() {
    Windows3d& g = windows;
    return std::tie(g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode, is_batch, input_size, format);
  }
  Link link() const { return {Link::To::operands, /*count=*/1, /*zeros=*/true}; }

  variable_list gradients(const Tensor& grad, Kept taps, const std::vector<bool>& wanted) const {
    if (!wanted[0]) return {Tensor()};
    const Windows3d& g = windows;
    const auto [indices, inside] = indices_of(taps(0), input_size, g);
    const Tensor dy = at::where(inside, in_batch(grad, is_batch), 0);
    const Tensor dx = at::max_pool3d_with_indices_backward(dy, without_data(input_size, grad, format), g.kernel_size,
                                                           g.stride, g.padding, g.dilation, g.ceil_mode, indices);
    return {is_batch ? in_layout(dx, format) : dx.squeeze(0)};
  }
};

Pair indices_entry(const Tensor& input, const Windows3d& g) {
  // On a GPU taps would take ten passes over the indices that torch keeps.
  const bool is_torch_s =
      input.is_cuda() || route(Op::max_pool3d, Backend::automatic, input).computer == Computer::formula;
  if (is_torch_s || input.dim() < 4 || input.dim() > 5 || !g.has_taps()) return by_aten(input, g);
  return record_max_pool3d(input, g, [&] { return by_aten(input, g); });
}

Tensor pool_entry(const Tensor& input, const Windows3d& g) { return std::get<0>(indices_entry(input, g)); }

Tensor pool_plain(const Tensor& input, const Windows3d& g) {
  return at::max_pool3d(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
}

using PoolOperator3d = SettingsOperator<Windows3d, Tensor(const Tensor& input)>;
using PoolPairOperator3d = SettingsOperator<Windows3d, Pair(const Tensor& input)>;

void register_entries(torch::Library& m) {
  m.impl("max_pool3d", PoolOperator3d::kernel<pool_entry>);
  m.impl("max_pool3d_with_indices", PoolPairOperator3d::kernel<indices_entry>);
}

}  // namespace

Windows3d::Windows3d(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                     bool ceil_mode)
    : kernel_size(triple(kernel_size, "kernel_size")),
      stride(stride.empty() ? this->kernel_size : triple(stride, "stride")), padding(triple(padding, "padding")),
      dilation(triple(dilation, "dilation")), ceil_mode(ceil_mode) {}

bool Windows3d::has_taps() const {
  return static_cast<double>(kernel_size[0]) * kernel_size[1] * kernel_size[2] < kExtentLimit;
}

at::ScalarType Windows3d::tap_type() const {
  const int64_t taps = kernel_size[0] * kernel_size[1] * kernel_size[2];
  return taps <= 256 ? at::kByte : taps <= 32768 ? at::kShort : at::kInt;
}

Pair record_max_pool3d(const Tensor& x, const Windows3d& g, c10::function_ref<Pair()> compute) {
  const bool is_batch = x.dim() == 5;
  std::vector<c10::SymInt> size = owned(x.sym_sizes());
  if (!is_batch) size.insert(size.begin(), 1);
  auto [y, indices, taps] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, places] = compute();
    return std::make_tuple(value, places, taps_of(in_batch(places, is_batch), size, g));
  }();
  const auto format = is_batch ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
  const auto node = formula_node("FreezekitMaxPool3dBackward", PoolGradient3d{g, is_batch, std::move(size), format}, x);
  node->keep(taps);
  torch::autograd::set_history(y, node);
  return {y, indices};
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string settings =
      "SymInt[3] kernel_size, SymInt[3] stride=[], SymInt[3] padding=0, SymInt[3] dilation=1, bool ceil_mode=False) -> ";
  m.def(("max_pool3d(Tensor input, " + settings + "Tensor").c_str(), tags);
  m.def(("max_pool3d_with_indices(Tensor input, " + settings + "(Tensor, Tensor)").c_str(), tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("max_pool3d", PoolOperator3d::kernel<pool_plain>);
  m.impl("max_pool3d_with_indices", PoolPairOperator3d::kernel<by_aten>);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { register_entries(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { register_entries(m); }

}  // namespace freezekit
