#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/zeros.h>

#include <functional>

#include "cpu/few_rows.h"
#include "torch/backends/few.h"

namespace freezekit::few_positions {
namespace {

// From about 20 positions on, oneDNN's reorder is paid for. Of a filter that stays in the caches it is cheap: there only a
// handful of positions is faster forward. (Measured on AVX2, one thread, 1 to 256 positions; at 64 this took 1.1 to 1.8 of
// oneDNN's time.)
constexpr int64_t kMostPositions = 16, kFewest = 4, kLargeFilter = 1 << 18;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

cpu::FewRows size_of(const Conv2dProblem& p) { return {p.n * p.p * p.q, p.k, p.c * p.r * p.s}; }

// Rows of columns are rows of the input.
bool is_plain(const Conv2dProblem& p) {
  return p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

// How columns are laid out: as the filter's memory, taps outermost (KRSC) or channels (KCRS).
struct Order {
  int64_t tap, channel;  // steps
};
Order order_of(const Conv2dProblem& p, const Tensor& weight) {
  const bool last = weight.is_contiguous(kLast);
  return last ? Order{p.c, 1} : Order{1, p.r * p.s};
}

// f(offset of a position of the input in NHWC, offset in the columns of its tap) for taps inside the input, of positions
// of images first ... last - 1.
template <class F>
void for_each_tap(const Conv2dProblem& p, const Order& order, int64_t first, int64_t last, const F& f) {
  const int64_t length = p.c * p.r * p.s;
  for (int64_t m = first * p.p * p.q; m < last * p.p * p.q; ++m) {
    const int64_t n = m / (p.p * p.q), row = m / p.q % p.p, column = m % p.q;
    for (int64_t r = 0; r < p.r; ++r) {
      const int64_t h = row * p.stride_h - p.pad_h + r * p.dilation_h;
      if (h < 0 || h >= p.h) continue;
      for (int64_t s = 0; s < p.s; ++s) {
        const int64_t w = column * p.stride_w - p.pad_w + s * p.dilation_w;
        if (w < 0 || w >= p.w) continue;
        f(((n * p.h + h) * p.w + w) * p.c, m * length + (r * p.s + s) * order.tap);
      }
    }
  }
}

}  // namespace

bool takes(Operator op, const Conv2dProblem& p, const Tensor& activation, const Tensor& weight) {
  const cpu::FewRows size = size_of(p);
  if (op == Operator::fprop && size.rows > kFewest && weight.numel() < kLargeFilter) return false;
  return activation.is_cpu() && activation.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
         p.groups == 1 && size.rows > 0 && size.rows <= kMostPositions && p.x_numel() > 0 &&
         (weight.is_contiguous() || weight.is_contiguous(kLast));
}

Tensor conv2d(const Conv2dProblem& p, const Tensor& input, const Tensor& weight) {
  const cpu::FewRows size = size_of(p);
  Tensor columns = input.contiguous(kLast);
  if (!is_plain(p)) {
    const float* const x = columns.const_data_ptr<float>();
    const Order order = order_of(p, weight);
    Tensor gathered = at::zeros({size.rows, size.length}, input.options());
    float* const to = gathered.mutable_data_ptr<float>();
    for_each_tap(p, order, 0, p.n, [&](int64_t from, int64_t at) {
      for (int64_t c = 0; c < p.c; ++c) to[at + c * order.channel] = x[from + c];
    });
    columns = gathered;
  }
  const Tensor y = at::zeros({p.n, p.p, p.q, p.k}, input.options());
  const float *const a = columns.const_data_ptr<float>(), *const w = weight.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  // Threads take channels, so that each reads a part of the filter.
  const int64_t grain = std::max<int64_t>(3, at::internal::GRAIN_SIZE / std::max<int64_t>(size.length, 1));
  at::parallel_for(0, p.k, grain, [&](int64_t first, int64_t last) {
    cpu::in_vectors<cpu::products>(std::cref(size), a, w, to, first, last);
  });
  return y.permute({0, 3, 1, 2});
}

Tensor dgrad(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  const cpu::FewRows size = size_of(p);
  const Tensor rows = grad_output.contiguous(kLast);
  const Tensor dx = at::zeros({p.n, p.h, p.w, p.c}, grad_output.options());
  const Tensor columns = is_plain(p) ? dx : at::zeros({size.rows, size.length}, grad_output.options());
  const float *const dy = rows.const_data_ptr<float>(), *const w = weight.const_data_ptr<float>();
  float* const d = columns.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(128, at::internal::GRAIN_SIZE / std::max<int64_t>(size.channels, 1));
  at::parallel_for(0, size.length, grain, [&](int64_t first, int64_t last) {
    cpu::in_vectors<cpu::combinations>(std::cref(size), dy, w, d, first, last);
  });
  if (!is_plain(p)) {
    float* const to = dx.mutable_data_ptr<float>();
    const Order order = order_of(p, weight);
    at::parallel_for(0, p.n, 1, [&](int64_t first, int64_t last) {
      for_each_tap(p, order, first, last, [&](int64_t at, int64_t from) {
        for (int64_t c = 0; c < p.c; ++c) to[at + c] += d[from + c * order.channel];
      });
    });
  }
  return dx.permute({0, 3, 1, 2});
}

}  // namespace freezekit::few_positions
