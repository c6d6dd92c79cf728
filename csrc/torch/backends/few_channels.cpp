#include "cpu/few_channels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <functional>

#include "torch/backends/few.h"
#include "torch/common/layout.h"

namespace freezekit::few_channels {
namespace {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;
constexpr int64_t kMostChannels = 3;
// Elements of a row of the filter, (s, c): of fewer, the sums are too short. In NCHW dy is copied first. (Measured on a Zen 4,
// one thread, 28 x 28 to 224 x 224: 0.2 to 0.9 of oneDNN's time; of a row of 9 in NCHW up to 4.6, of 6 1.07.)
constexpr int64_t kFewestInRow = 9, kFewestInNchwRow = 12;
// Filters, times the stride: what adding to dx takes does not depend on them, and of fewer oneDNN is the faster in NHWC. (Measured
// likewise, 128 x 128: 2.7 of its time for 2 filters of 3 x 3, 1.3 for 8, 1.0 for 12.) Of one channel it is not.
constexpr int64_t kFewestFilters = 12;

bool has_few_filters(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  return p.c > 1 && p.k * p.stride_w < kFewestFilters && layout_of(grad_output, weight) == kLast;
}

}  // namespace

bool takes(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  const int64_t fewest = grad_output.is_contiguous(kLast) ? kFewestInRow : kFewestInNchwRow;
  return grad_output.is_cpu() && grad_output.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
         p.groups == 1 && p.c <= kMostChannels && p.s * p.c >= fewest && p.dilation_w == 1 && p.x_numel() > 0 &&
         p.y_numel() > 0 && !has_few_filters(p, grad_output, weight);
}

Tensor dgrad(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  const Tensor rows = grad_output.contiguous(kLast), dense = weight.contiguous(kLast);
  const Tensor dx = at::zeros({p.n, p.h, p.w, p.c}, grad_output.options());
  const cpu::FilterRows filter(p, dense.const_data_ptr<float>());
  const float* const dy = rows.const_data_ptr<float>();
  float* const to = dx.mutable_data_ptr<float>();
  // Bands side by side add to the same rows, so every second one runs, and then the others: sums have one order
  // whatever the number of threads.
  const int64_t size = cpu::rows_of_band(p), bands = (p.p + size - 1) / size;
  for (const int64_t parity : {0, 1}) {
    const int64_t half = (bands + 1 - parity) / 2;
    at::parallel_for(0, p.n * half, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = i / half, band = 2 * (i % half) + parity;
        cpu::in_vectors<cpu::add_bands>(std::cref(p), std::cref(filter), dy + image * p.p * p.q * p.k,
                                        to + image * p.h * p.w * p.c, band * size, std::min(p.p, (band + 1) * size));
      }
    });
  }
  return dx.permute({0, 3, 1, 2});
}

}  // namespace freezekit::few_channels
