// Max pooling in three dimensions. What is kept from the value to the gradient is a tap per output, its place in the
// window. csrc/cpu computes both; ATen does under modes, tracers and transforms, by int64 indices (d * H + h) * W + w.
//
//   max_pool3d(input, ...)               torch's value; its node keeps taps where torch keeps input and indices
//   max_pool3d_with_indices(input, ...)  the same, and torch's indices, which only the caller keeps
#include "torch/max_pool3d/max_pool3d.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Pool.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool3d.h>
#include <ATen/ops/max_pool3d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices_backward.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "torch/autograd/formula.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"
#include "torch/common/unseen.h"
#include "torch/max_pool2d/steps.h"

namespace freezekit {
namespace {

using Place = std::array<int64_t, 3>;
using Pair = std::tuple<Tensor, Tensor>;

constexpr int64_t kRowsPerTask = 64;

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

// Which tap along an axis reads `place`, as taps_of_indices has it.
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
  max_pool::for_tap_type(g.tap_type(), [&](auto tap) {
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

Tensor taps_of(const Tensor& indices, SymIntArrayRef input_size, const Windows3d& g) {
  if (is_plain_on_cpu(indices)) return taps_on_cpu(indices, C10_AS_INTARRAYREF_SLOW(input_size), g);
  return max_pool::taps_of_indices(indices, input_size, g).to(g.tap_type());
}

// A batch of one, of what has none.
Tensor in_batch(const Tensor& tensor, bool is_batch) { return is_batch ? tensor : tensor.unsqueeze(0); }

max_pool::CpuPool problem(IntArrayRef in, IntArrayRef out, at::MemoryFormat format, const Windows3d& g) {
  const auto &k = g.kernel_size, &s = g.stride, &p = g.padding, &d = g.dilation;
  const Pooling plane = {in[3], in[4], out[3], out[4], k[1], k[2], s[1], s[2], p[1], p[2], d[1], d[2]};
  return {{plane, in[2], out[2], k[0], s[0], p[0], d[0]}, in[0], in[1], format != at::MemoryFormat::Contiguous};
}

// (N, C, O, P, Q), by torch's own checks of `input`, which may be one volume; their messages are torch's.
std::vector<int64_t> output_size(const Tensor& input, IntArrayRef size, const Windows3d& g) {
  std::vector<int64_t> out = {size[0], size[1]};
  for (size_t i = 0; i < 3; ++i) {
    out.push_back(at::native::pooling_output_shape<int64_t>(size[2 + i], g.kernel_size[i], g.padding[i], g.stride[i],
                                                            g.dilation[i], g.ceil_mode));
  }
  const auto &k = g.kernel_size, &s = g.stride, &p = g.padding, &d = g.dilation;
  at::native::pool3d_shape_check(input, size[1], k[0], k[1], k[2], s[0], s[1], s[2], p[0], p[1], p[2], d[0], d[1], d[2],
                                 size[2], size[3], size[4], out[2], out[3], out[4], "max_pool3d_with_indices()");
  return out;
}

// As torch lays out the value. The stride that unsqueeze gives a batch of one fits NCDHW alone.
at::MemoryFormat layout_of_batch(const Tensor& x, const Tensor& batch) {
  if (x.dim() == 5) return batch.suggest_memory_format();
  const bool is_last = !batch.is_contiguous() && batch.is_contiguous(at::MemoryFormat::ChannelsLast3d);
  return is_last ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::Contiguous;
}

// Value and taps, the latter of a batch.
Pair pool_on_cpu(const Tensor& x, const Windows3d& g) {
  const bool is_batch = x.dim() == 5;
  const Tensor batch = in_batch(x, is_batch);
  const std::vector<int64_t> out = output_size(x, batch.sizes(), g);
  const SymIntArrayRef sizes = c10::fromIntArrayRefSlow(out);
  const auto format = layout_of_batch(x, batch);
  const Tensor y = empty_beside(x, sizes, format, x.scalar_type()), taps = empty_beside(x, sizes, format, g.tap_type());
  if (y.numel() > 0) {
    max_pool::forward_cpu(problem(batch.sizes(), out, format, g), batch.contiguous(format), y, taps);
  }
  return {is_batch ? y : y.squeeze(0), taps};
}

Tensor scatter_on_cpu(const Tensor& dy, const Tensor& taps, SymIntArrayRef size, at::MemoryFormat format,
                      const Windows3d& g) {
  const Tensor dx = empty_beside(dy, size.slice(5 - dy.dim()), format, dy.scalar_type()).zero_();
  if (taps.numel() > 0) {
    const auto m = problem(C10_AS_INTARRAYREF_SLOW(size), taps.sizes(), format, g);
    max_pool::scatter_cpu(m, dy.contiguous(format), taps.contiguous(format), dx);
  }
  return dx;
}

struct PoolGradient3d {
  Windows3d windows;
  bool is_batch = true;                                    // else the input is one volume
  std::vector<c10::SymInt> input_size;                     // (N, C, D, H, W)
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the input

  auto fields() { return std::tuple_cat(windows.fields(), std::tie(is_batch, input_size, format)); }
  Link link() const { return {Link::To::operands, /*count=*/1, /*zeros=*/true}; }

  variable_list gradients(const Tensor& grad, Kept taps, const Wanted& wanted) const {
    if (!wanted[0]) return {Tensor()};
    const Windows3d& g = windows;
    const Tensor kept = taps(0);
    if (reaches_kernel(grad, kept)) {
      return {below_autograd([&] { return scatter_on_cpu(grad, kept, input_size, format, g); })};
    }
    const auto [at, inside] = max_pool::indices_of_taps(kept, input_size, g);
    const Tensor dy = at::where(inside, in_batch(grad, is_batch), 0), indices = at::where(inside, at, 0);
    const Tensor dx = at::max_pool3d_with_indices_backward(dy, without_data(input_size, grad, format), g.kernel_size,
                                                           g.stride, g.padding, g.dilation, g.ceil_mode, indices);
    return {is_batch ? in_layout(dx, format) : dx.squeeze(0)};
  }
};

// y, taps = compute(size of the batch), run below autograd, as the value of a max pooling of x.
template <class Compute>
Tensor record(const Tensor& x, const Windows3d& g, const Compute& compute) {
  const bool is_batch = x.dim() == 5;
  std::vector<c10::SymInt> size = owned(x.sym_sizes());
  if (!is_batch) size.insert(size.begin(), 1);
  auto [y, taps] = below_autograd([&] { return compute(SymIntArrayRef(size)); });
  const auto format = is_batch ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
  const auto node = formula_node("FreezekitMaxPool3dBackward", PoolGradient3d{g, is_batch, std::move(size), format}, x);
  return with_history(std::move(y), node, taps);
}

Pair indices_entry(const Tensor& input, const Windows3d& g) {
  if (!keeps_taps(input, g)) return by_aten(input, g);
  return record_max_pool3d_with_indices(input, g, [&] { return by_aten(input, g); });
}

Tensor pool_plain(const Tensor& input, const Windows3d& g) {
  return at::max_pool3d(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
}

using PoolOperator3d = SettingsOperator<Windows3d, Tensor(const Tensor& input)>;
using PoolPairOperator3d = SettingsOperator<Windows3d, Pair(const Tensor& input)>;

// Torch's autocast on a CPU computes this in float32, but not the one that returns indices.
Tensor pool_autocast(const Tensor& input, const Windows3d& g) {
  static const PoolOperator3d op("freezekit::max_pool3d");
  const c10::impl::ExcludeDispatchKeyGuard no_more(c10::autocast_dispatch_keyset);
  return op(at::autocast::cached_cast(at::kFloat, input, at::kCPU), g);
}

void register_entries(torch::Library& m) {
  m.impl("max_pool3d", PoolOperator3d::kernel<record_max_pool3d>);
  m.impl("max_pool3d_with_indices", PoolPairOperator3d::kernel<indices_entry>);
}

}  // namespace

bool keeps_taps(const Tensor& input, const Windows3d& g) {
  // On a GPU taps would take ten passes over the indices that torch keeps. A volume in channels_last torch refuses.
  const bool is_refused = input.dim() == 4 && input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return !input.is_cuda() && !is_refused && (input.dim() == 4 || input.dim() == 5) && g.taps() < kExtentLimit &&
         route(Op::max_pool3d, Backend::automatic, input).computer != Computer::formula;
}

Tensor record_max_pool3d(const Tensor& input, const Windows3d& g) {
  if (!keeps_taps(input, g)) return pool_plain(input, g);
  return record(input, g, [&](SymIntArrayRef size) -> Pair {
    if (reaches_kernel(input)) return pool_on_cpu(input, g);
    const auto [y, indices] = by_aten(input, g);
    return {y, taps_of(in_batch(indices, input.dim() == 5), size, g)};
  });
}

Pair record_max_pool3d_with_indices(const Tensor& x, const Windows3d& g, c10::function_ref<Pair()> compute) {
  Tensor indices;
  const Tensor y = record(x, g, [&](SymIntArrayRef size) -> Pair {
    Tensor value;
    std::tie(value, indices) = compute();
    return {value, taps_of(in_batch(indices, x.dim() == 5), size, g)};
  });
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
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) { m.impl("max_pool3d", PoolOperator3d::kernel<pool_autocast>); }

}  // namespace freezekit
