// Max pooling on a CPU: how csrc/cpu's kernels are cut into tasks. No two tasks share an element of the result.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <functional>
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
constexpr int64_t kNarrow = 8;  // outputs in a row that are too few for vectors

int64_t grain(int64_t work_of_one) { return std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, work_of_one)); }

// f(an element of the dtype, a tap of the type of taps)
template <class F>
void dispatch(const Tensor& values, const Tensor& taps, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "freezekit::max_pool2d",
                                  [&] { for_tap_type(taps.scalar_type(), [&](auto tap) { f(scalar_t(), tap); }); });
}

// Calls f(offset in the larger tensor, offset in the smaller one, channels there, elements between places) for parts
// that no two threads share.
template <class F>
void for_each_part(const CpuPool& m, const F& f) {
  const int64_t n = m.n, c = m.c, in = m.window.places(), out = m.window.rows() * m.window.plane.q;
  if (!m.channels_last) {
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

void forward_cpu(const CpuPool& m, const Tensor& x, const Tensor& y, const Tensor& taps) {
  const cpu::Pooling3d& g = m.window;
  const int64_t q = g.plane.q, in = g.places(), rows = g.rows();
  // A task is a row of outputs: of one channel, or of all of them.
  const int64_t volumes = m.channels_last ? m.n : m.n * m.c, channels = m.channels_last ? m.c : 1;
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    using C = cpu::Compute<T>;
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    Tap* out = taps.mutable_data_ptr<Tap>();
    const auto each_row = [&](int64_t first, int64_t last, const auto& f) {
      const T* volume = from + first / rows * in * channels;
      cpu::OutputRow row = {first % rows / g.plane.p, first % g.plane.p};
      for (int64_t i = first; i < last; ++i) {
        f(volume, to + i * q * channels, out + i * q * channels, row);
        if (++row.p == g.plane.p) row.p = 0, ++row.o;
        if (row.o == g.o) row.o = 0, volume += in * channels;
      }
    };
    at::parallel_for(0, volumes * rows, grain(q * channels * g.taps()), [&](int64_t first, int64_t last) {
      if (channels > 1) {
        std::vector<C> best(channels);
        std::vector<int32_t> at(channels);
        each_row(first, last, [&](const T* volume, T* values, Tap* places, const cpu::OutputRow& row) {
          cpu::in_vectors<cpu::max_pool_pixels<T, C, Tap>>(volume, values, places, std::cref(g), std::cref(row),
                                                           channels, best.data(), at.data());
        });
      } else if (q < kNarrow) {
        each_row(first, last, [&](const T* volume, T* values, Tap* places, const cpu::OutputRow& row) {
          cpu::max_pool_windows<C>(volume, values, places, g, row);
        });
      } else {
        cpu::RowOfOutputs<C> scratch(g.plane);
        each_row(first, last, [&](const T* volume, T* values, Tap* places, const cpu::OutputRow& row) {
          cpu::in_vectors<cpu::max_pool_row<T, C, Tap>>(volume, values, places, std::cref(g), std::cref(row),
                                                        std::ref(scratch));
        });
      }
    });
  });
}

void scatter_cpu(const CpuPool& m, const Tensor& dy, const Tensor& taps, const Tensor& dx) {
  dispatch(dy, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = dy.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = dx.mutable_data_ptr<T>();
    const cpu::TapPositions position(m.window);
    for_each_part(m, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      cpu::max_pool_scatter(from + out, where + out, to + in, position, count, step);
    });
  });
}

void gather_cpu(const CpuPool& m, const Tensor& x, const Tensor& taps, const Tensor& y) {
  dispatch(x, taps, [&](auto element, auto tap) {
    using T = decltype(element);
    const T* from = x.const_data_ptr<T>();
    const auto* where = taps.const_data_ptr<decltype(tap)>();
    T* to = y.mutable_data_ptr<T>();
    const cpu::TapPositions position(m.window);
    for_each_part(m, [&](int64_t in, int64_t out, int64_t count, int64_t step) {
      cpu::max_pool_gather(from + in, where + out, to + out, position, count, step);
    });
  });
}

}  // namespace freezekit::max_pool
