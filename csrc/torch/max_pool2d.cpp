// Max pooling on tensors with data, and the way into the dispatcher. Autograd stands in max_pool2d_autograd.cpp.
#include "torch/max_pool2d.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/compute.h"
#include "cpu/simd.h"
#include "torch/gate.h"

namespace freezekit {
namespace {

std::array<int64_t, 2> pair(IntArrayRef values, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, name, " must be one number or two (height, width), got ",
              values.size(), " of them: ", values);
  return {values.front(), values.back()};
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

constexpr int64_t kChannels = 64;  // NHWC: channels that one task of the scatter takes, a cache line or more
constexpr int64_t kWorkPerTask = 32768;

int64_t grain(int64_t work_of_one) { return std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, work_of_one)); }

template <class T, class C, class Tap>
FK_SIMD_CLONES void pool_pixels(const T* x, T* y, Tap* taps, const cpu::Pooling& g, int64_t row, int64_t channels,
                                C* best, int32_t* tap) {
  cpu::max_pool_pixels(x, y, taps, g, row, channels, best, tap);
}

template <class C, class T>
FK_SIMD_CLONES void convert(const C* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

template <class F>
void for_tap_type(at::ScalarType type, const F& f) {
  if (type == at::kByte) return f(uint8_t());
  if (type == at::kShort) return f(int16_t());
  f(int32_t());
}

// f(an element of the dtype, a tap of the type of taps)
template <class F>
void dispatch(const Tensor& values, const Tensor& taps, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "freezekit::max_pool2d", [&] {
    for_tap_type(taps.scalar_type(), [&](auto tap) { f(scalar_t(), tap); });
  });
}

// A call has one format for all its tensors: those of size 1 suggest another one than their neighbours.
bool is_nhwc(at::MemoryFormat format) { return format == at::MemoryFormat::ChannelsLast; }

void forward_cpu(const Tensor& x, const Tensor& y, const Tensor& taps, const cpu::Pooling& g, bool nhwc) {
  const int64_t n = x.size(0), c = x.size(1), work = g.p * g.q * g.kernel_h * g.kernel_w;
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    using C = cpu::Compute<T>;
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    Tap* out = taps.mutable_data_ptr<Tap>();
    const int64_t in = g.h * g.w, made = g.p * g.q;
    if (!nhwc) {
      at::parallel_for(0, n * c, grain(work), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          cpu::max_pool_plane<T, C>(from + i * in, to + i * made, out + i * made, g);
        }
      });
      return;
    }
    at::parallel_for(0, n * g.p, grain(work * c / std::max<int64_t>(1, g.p)), [&](int64_t first, int64_t last) {
      std::vector<C> best(c);
      std::vector<int32_t> at(c);
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i * g.q * c;
        pool_pixels<T, C>(from + i / g.p * in * c, to + begin, out + begin, g, i % g.p, c, best.data(), at.data());
      }
    });
  });
}

template <class T, class Tap>
void scatter_plane(const T* dy, const Tap* taps, T* dx, const cpu::Pooling& g, const cpu::TapPositions& position,
                   int64_t count, int64_t step) {
  using C = cpu::Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    cpu::max_pool_scatter(dy, taps, dx, g, position, count, step, step);
  } else {
    // Windows overlap: sums are made in float and rounded once.
    std::vector<C> sums(g.h * g.w * count, C(0));
    cpu::max_pool_scatter(dy, taps, sums.data(), g, position, count, step, count);
    for (int64_t at = 0; at < (count == step ? 1 : g.h * g.w); ++at) {
      convert(sums.data() + at * count, dx + at * step, count == step ? g.h * g.w * count : count);
    }
  }
}

// Calls f(offset in the larger tensor, offset in the smaller one, channels there, elements between places) for parts
// that no two threads share.
template <class F>
void for_each_part(const Tensor& like, const cpu::Pooling& g, bool nhwc, const F& f) {
  const int64_t n = like.size(0), c = like.size(1), in = g.h * g.w, out = g.p * g.q;
  if (!nhwc) {
    at::parallel_for(0, n * c, grain(in), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(i * in, i * out, int64_t{1}, int64_t{1});
    });
    return;
  }
  const int64_t parts = (c + kChannels - 1) / kChannels;
  at::parallel_for(0, n * parts, grain(in * kChannels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / parts, channel = i % parts * kChannels;
      f(image * in * c + channel, image * out * c + channel, std::min(kChannels, c - channel), c);
    }
  });
}

void scatter_cpu(const Tensor& dy, const Tensor& taps, const Tensor& dx, const cpu::Pooling& g, bool nhwc) {
  dispatch(dy, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = dy.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = dx.mutable_data_ptr<T>();
    const cpu::TapPositions position(g);
    for_each_part(dy, g, nhwc, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      scatter_plane(from + out, where + out, to + in, g, position, count, step);
    });
  });
}

void gather_cpu(const Tensor& x, const Tensor& taps, const Tensor& y, const cpu::Pooling& g, bool nhwc) {
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = x.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = y.mutable_data_ptr<T>();
    const cpu::TapPositions position(g);
    for_each_part(y, g, nhwc, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      cpu::max_pool_gather(from + in, where + out, to + out, g, position, count, step);
    });
  });
}

// Where the taps lie: (positions h * W + w, whether that is inside the input), both (N, C, P, Q) and int64, bool.
std::pair<Tensor, Tensor> positions(const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  const Tensor tap = taps.to(at::kLong);
  const auto options = tap.options();
  const Tensor p = at::arange(tap.sym_size(2), options).unsqueeze(1), q = at::arange(tap.sym_size(3), options);
  const Tensor row = tap.div(g.kernel_size[1], "floor").mul(g.dilation[0]) + p.mul(g.stride[0]) - g.padding[0];
  const Tensor column = tap.remainder(g.kernel_size[1]).mul(g.dilation[1]) + q.mul(g.stride[1]) - g.padding[1];
  const auto& h = input_size[input_size.size() - 2];
  const auto& w = input_size[input_size.size() - 1];
  const Tensor inside = row.ge(0).logical_and(row.lt(h)).logical_and(column.ge(0)).logical_and(column.lt(w));
  return {row * w + column, inside};
}

Tensor scatter_by_aten(const Tensor& dy, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  const auto [at, inside] = positions(taps, input_size, g);
  const Tensor zeros = at::zeros_symint({input_size[0], input_size[1], input_size[2] * input_size[3]}, dy.options());
  return zeros.scatter_add(2, at::where(inside, at, 0).flatten(2), at::where(inside, dy, 0).flatten(2))
      .view_symint(input_size);
}

Tensor gather_by_aten(const Tensor& x, const Tensor& taps, const PoolGeometry& g) {
  const auto [at, inside] = positions(taps, x.sym_sizes(), g);
  const Tensor taken = x.flatten(2).gather(2, at::where(inside, at, 0).flatten(2));
  return at::where(inside, taken.view_symint(taps.sym_sizes()), 0);
}

Tensor taps_of_indices(const Tensor& indices, const Tensor& x, const PoolGeometry& g) {
  const auto options = indices.options();
  const Tensor p = at::arange(indices.sym_size(2), options).unsqueeze(1), q = at::arange(indices.sym_size(3), options);
  const c10::SymInt w = x.sym_size(3);
  const Tensor row = (indices.div(w, "floor") - p.mul(g.stride[0]) + g.padding[0]).div(g.dilation[0], "floor");
  const Tensor column = (indices.remainder(w) - q.mul(g.stride[1]) + g.padding[1]).div(g.dilation[1], "floor");
  return (row * g.kernel_size[1] + column).to(g.tap_type());
}

// Size, strides and torch's own error messages, without data.
Tensor output_like(const Tensor& input, const PoolGeometry& g) {
  const Tensor shape = at::empty_strided_symint(input.sym_sizes(), input.sym_strides(), input.options().device(at::kMeta));
  return std::get<0>(at::max_pool2d_with_indices(shape, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode));
}

void check_input(const Tensor& input) {
  TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions (N, C, H, W), got ", input.dim(), ": ",
              input.sym_sizes());
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "input must be of a floating dtype, got ", input.scalar_type());
}

void check_taps(const Tensor& values, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_input(values);
  TORCH_CHECK(input_size.size() == 4, "input_size must have 4 numbers (N, C, H, W), got ", input_size);
  TORCH_CHECK(taps.scalar_type() == g.tap_type(), "taps must have dtype ", g.tap_type(), ", got ", taps.scalar_type());
  TORCH_CHECK(taps.device() == values.device(), "taps are on ", taps.device(), ", the other tensor on ",
              values.device());
  TORCH_CHECK(taps.dim() == 4 && taps.sym_size(0) == input_size[0] && taps.sym_size(1) == input_size[1],
              "taps must have size (N, C, P, Q) with N and C of ", input_size, ", got ", taps.sym_sizes());
}

std::tuple<Tensor, Tensor> taps_kernel(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                       IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                       std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  check_input(input);
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor shape = output_like(input, g);
  if (computer_for(input, backend) != Computer::cpu) {
    auto [y, indices] =
        at::max_pool2d_with_indices(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
    return {y, taps_of_indices(indices, input, g)};
  }
  const Tensor y = at::empty_strided(shape.sizes(), shape.strides(), input.options());
  const Tensor taps = at::empty_strided(shape.sizes(), shape.strides(), input.options().dtype(g.tap_type()));
  if (y.numel() == 0) return {y, taps};
  const auto format = input.suggest_memory_format();
  forward_cpu(input.contiguous(format), y, taps, g.pooling(input.size(2), input.size(3), y.size(2), y.size(3)),
              is_nhwc(format));
  return {y, taps};
}

Tensor scatter_kernel(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size,
                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                      std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  check_taps(grad_output, taps, input_size, g);
  TORCH_CHECK(grad_output.sizes() == taps.sizes(), "grad_output must have the size of taps, ", taps.sizes(), ", got ",
              grad_output.sizes());
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto format = taps.suggest_memory_format();
  const auto size = C10_AS_INTARRAYREF_SLOW(input_size);
  if (computer_for(grad_output, backend) != Computer::cpu) {
    return scatter_by_aten(grad_output, taps, input_size, g).contiguous(format);
  }
  const Tensor dx = at::empty(size, grad_output.options(), format).zero_();
  if (dx.numel() == 0 || taps.numel() == 0) return dx;
  scatter_cpu(grad_output.contiguous(format), taps.contiguous(format), dx,
              g.pooling(size[2], size[3], taps.size(2), taps.size(3)), is_nhwc(format));
  return dx;
}

Tensor gather_kernel(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                     std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  check_taps(input, taps, input_size, g);
  TORCH_CHECK(input.sym_sizes() == input_size, "input must have size ", input_size, ", got ", input.sizes());
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto format = taps.suggest_memory_format();
  if (computer_for(input, backend) != Computer::cpu) return gather_by_aten(input, taps, g).contiguous(format);
  const Tensor y = at::empty(taps.sizes(), input.options(), format);
  if (y.numel() == 0) return y;
  gather_cpu(input.contiguous(format), taps.contiguous(format), y,
             g.pooling(input.size(2), input.size(3), taps.size(2), taps.size(3)), is_nhwc(format));
  return y;
}

std::tuple<Tensor, Tensor> taps_meta(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                     IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                     std::string_view backend) {
  const PoolGeometry g(kernel_size, stride, padding, dilation, ceil_mode, backend);
  check_input(input);
  const Tensor y = output_like(input, g);
  return {y, at::empty_like(y, y.options().dtype(g.tap_type()))};
}

Tensor scatter_meta(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size,
                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                    std::string_view backend) {
  check_taps(grad_output, taps, input_size, {kernel_size, stride, padding, dilation, ceil_mode, backend});
  return at::empty_symint(input_size, grad_output.options(), taps.suggest_memory_format());
}

Tensor gather_meta(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                   std::string_view backend) {
  check_taps(input, taps, input_size, {kernel_size, stride, padding, dilation, ceil_mode, backend});
  return at::empty_symint(taps.sym_sizes(), input.options(), taps.suggest_memory_format());
}

Tensor scatter_batched(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                       IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       bool ceil_mode, std::string_view backend) {
  return scatter_by_aten(grad_output, taps, input_size, {kernel_size, stride, padding, dilation, ceil_mode, backend});
}

Tensor gather_batched(const Tensor& input, const Tensor& taps, SymIntArrayRef, IntArrayRef kernel_size,
                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                      std::string_view backend) {
  return gather_by_aten(input, taps, {kernel_size, stride, padding, dilation, ceil_mode, backend});
}

}  // namespace

PoolGeometry::PoolGeometry(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           bool ceil_mode, std::string_view backend)
    : kernel_size(pair(kernel_size, "kernel_size")),
      stride(stride.empty() ? this->kernel_size : pair(stride, "stride")),
      padding(pair(padding, "padding")),
      dilation(pair(dilation, "dilation")),
      ceil_mode(ceil_mode),
      backend(backend) {}

cpu::Pooling PoolGeometry::pooling(int64_t h, int64_t w, int64_t p, int64_t q) const {
  return {h,         w,         p,          q,          kernel_size[0], kernel_size[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0],    dilation[1]};
}

at::ScalarType PoolGeometry::tap_type() const {
  const int64_t taps = kernel_size[0] * kernel_size[1];
  return taps <= 256 ? at::kByte : taps <= 32768 ? at::kShort : at::kInt;
}

std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& input, const PoolGeometry& g) {
  static const auto op = find<TapsSignature>("freezekit::max_pool2d_taps");
  return op.call(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode, g.backend);
}

Tensor max_pool2d_scatter(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                          const PoolGeometry& g) {
  static const auto op = find<TapMapSignature>("freezekit::max_pool2d_scatter");
  return op.call(grad_output, taps, input_size, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode, g.backend);
}

Tensor max_pool2d_gather(const Tensor& input, const Tensor& taps, const PoolGeometry& g) {
  static const auto op = find<TapMapSignature>("freezekit::max_pool2d_gather");
  return op.call(input, taps, input.sym_sizes(), g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode,
                 g.backend);
}

Tensor max_pool2d_indices(const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  return positions(taps, input_size, g).first;
}

}  // namespace freezekit

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "max_pool2d_taps(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False, *, str backend=\"auto\") -> (Tensor, Tensor)",
      tags);
  m.def(
      "max_pool2d_scatter(Tensor grad_output, Tensor taps, SymInt[] input_size, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False, *, str backend=\"auto\") -> Tensor",
      tags);
  m.def(
      "max_pool2d_gather(Tensor input, Tensor taps, SymInt[] input_size, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False, *, str backend=\"auto\") -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d_taps", freezekit::taps_kernel);
  m.impl("max_pool2d_scatter", freezekit::scatter_kernel);
  m.impl("max_pool2d_gather", freezekit::gather_kernel);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("max_pool2d_taps", freezekit::taps_meta);
  m.impl("max_pool2d_scatter", freezekit::scatter_meta);
  m.impl("max_pool2d_gather", freezekit::gather_meta);
}
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) {
  m.impl("max_pool2d_scatter", freezekit::scatter_batched);
  m.impl("max_pool2d_gather", freezekit::gather_batched);
}
