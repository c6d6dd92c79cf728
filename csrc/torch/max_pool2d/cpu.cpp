// Max pooling on a CPU: how csrc/cpu's kernels are cut into tasks. No two tasks share an element of the result.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/compute.h"
#include "cpu/max_pool.h"
#include "cpu/simd.h"
#include "torch/backends/cpu_formats.h"
#include "torch/max_pool2d/steps.h"

namespace freezekit::max_pool {
namespace {

constexpr int64_t kChannels = 64;  // NHWC: channels that one task of the scatter takes, a cache line or more
constexpr int64_t kWorkPerTask = 32768;

int64_t grain(int64_t work_of_one) { return std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, work_of_one)); }

template <class T, class C, class Tap>
FK_SIMD_CLONES void pool_row(const T* x, T* y, Tap* taps, const Pooling& g, int64_t row, C* best, int32_t* tap) {
  cpu::max_pool_row(x, y, taps, g, row, best, tap);
}

template <class T, class C, class Tap>
FK_SIMD_CLONES void pool_pixels(const T* x, T* y, Tap* taps, const Pooling& g, int64_t row, int64_t channels, C* best,
                                int32_t* tap) {
  cpu::max_pool_pixels(x, y, taps, g, row, channels, best, tap);
}

template <class T>
FK_SIMD_CLONES void convert(const cpu::Compute<T>* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = cpu::down<T>(from[i]);
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
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "freezekit::max_pool2d",
                                  [&] { for_tap_type(taps.scalar_type(), [&](auto tap) { f(scalar_t(), tap); }); });
}

template <class T, class Tap>
void scatter_plane(const T* dy, const Tap* taps, T* dx, const Pooling& g, const cpu::TapPositions& position,
                   int64_t count, int64_t step) {
  using C = cpu::Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    cpu::max_pool_scatter(dy, taps, dx, g, position, count, step, step);
  } else {
    // Windows overlap: sums are made in float and rounded once.
    std::vector<C> sums(g.h * g.w * count, C(0));
    cpu::max_pool_scatter(dy, taps, sums.data(), g, position, count, step, count);
    for (int64_t at = 0; at < (count == step ? 1 : g.h * g.w); ++at) {
      convert<T>(sums.data() + at * count, dx + at * step, count == step ? g.h * g.w * count : count);
    }
  }
}

// Calls f(offset in the larger tensor, offset in the smaller one, channels there, elements between places) for parts
// that no two threads share.
template <class F>
void for_each_part(const MaxPool& m, const F& f) {
  const Pooling& g = m.window;
  const int64_t n = m.n, c = m.c, in = g.h * g.w, out = g.p * g.q;
  if (!m.nhwc) {
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

}  // namespace

void forward_cpu(const MaxPool& m, const Tensor& x, const Tensor& y, const Tensor& taps) {
  const Pooling& g = m.window;
  const int64_t n = m.n, c = m.c, in = g.h * g.w;
  const bool nhwc = m.nhwc;
  // A task is a row of outputs: of a plane, or of an image's pixels.
  const int64_t planes = nhwc ? n : n * c, width = nhwc ? c : 1, scratch = nhwc ? c : g.q;
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    using C = cpu::Compute<T>;
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    Tap* out = taps.mutable_data_ptr<Tap>();
    const int64_t work = g.q * width * g.kernel_h * g.kernel_w;
    at::parallel_for(0, planes * g.p, grain(work), [&](int64_t first, int64_t last) {
      std::vector<C> best(scratch);
      std::vector<int32_t> at(scratch);
      for (int64_t i = first; i < last; ++i) {
        const T* plane = from + i / g.p * in * width;
        const int64_t begin = i * g.q * width;
        if (nhwc) {
          pool_pixels<T, C>(plane, to + begin, out + begin, g, i % g.p, c, best.data(), at.data());
        } else {
          pool_row<T, C>(plane, to + begin, out + begin, g, i % g.p, best.data(), at.data());
        }
      }
    });
  });
}

void scatter_cpu(const MaxPool& m, const Tensor& dy, const Tensor& taps, const Tensor& dx) {
  const Pooling& g = m.window;
  dispatch(dy, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = dy.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = dx.mutable_data_ptr<T>();
    const cpu::TapPositions position(g);
    for_each_part(m, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      scatter_plane(from + out, where + out, to + in, g, position, count, step);
    });
  });
}

void gather_cpu(const MaxPool& m, const Tensor& x, const Tensor& taps, const Tensor& y) {
  const Pooling& g = m.window;
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = x.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = y.mutable_data_ptr<T>();
    const cpu::TapPositions position(g);
    for_each_part(m, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      cpu::max_pool_gather(from + in, where + out, to + out, g, position, count, step);
    });
  });
}

}  // namespace freezekit::max_pool
