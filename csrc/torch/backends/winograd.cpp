#include "torch/backends/winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <functional>

#include "cpu/winograd.h"
#include "torch/common/lanes.h"
#include "torch/common/layout.h"

namespace freezekit::winograd {
namespace {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// Rows and columns of a result: of 7, a quarter of what tiles hold is not used. In NCHW vectors go along rows of tiles, and of
// short ones they are not full; there what it takes to read the input must be paid for by more channels, too. (Measured on a
// Zen 4, one thread, 32 to 512 channels, 1 to 8 images of 7 x 7 to 112 x 112, blocks and dgrads. Within these bounds it takes
// 0.5 to 0.9 of oneDNN's time; outside 0.7 to 1.5, in NCHW with 11 to 25 columns up to 1.2. With AVX2 alone it takes 0.6 to
// 0.9, but in NCHW 0.7 to 1.1, and is not used.)
constexpr int64_t kFewest = 12, kFewestInNchwRow = 28, kFewestNchwChannels = 64;
// Transforming the filters must be paid for by tiles. Of 256 x 256 channels they no longer fit into the second cache, which
// takes more of them. (Measured likewise: 0.65 of oneDNN's time at 64 channels and 49 tiles, 0.9 to 1.8 at 256; with AVX2
// 1.0 at 256 channels and 144 tiles.)
constexpr int64_t kFewestTiles = 64, kFiltersForEachTile = 32;  // the latter for each lane

// A dgrad is the convolution of dy by the filter turned by half a turn, with the rest of its padding.
cpu::Winograd size_of(Operator op, const Conv2dProblem& p, bool nhwc) {
  if (op == Operator::fprop) return {p.n, p.c, p.k, p.h, p.w, p.p, p.q, p.pad_h, p.pad_w, nhwc};
  return {p.n, p.k, p.c, p.p, p.q, p.h, p.w, 2 - p.pad_h, 2 - p.pad_w, nhwc};
}

cpu::WinogradFilter filter_of(Operator op, const Tensor& w) {
  const float* const first = w.const_data_ptr<float>();
  const int64_t k = w.stride(0), c = w.stride(1), r = w.stride(2), s = w.stride(3);
  if (op == Operator::fprop) return {first, k, c, r, s};
  return {first + 2 * r + 2 * s, c, k, -r, -s};
}

// Whether the result holds.
template <int kLanes>
bool run(const cpu::Winograd& size, const cpu::WinogradFilter& filter, const float* x, float* y,
         const at::TensorOptions& options) {
  using Vectors = cpu::InVectorsOf<kLanes>;
  const cpu::WinogradBlock<kLanes> block(size);
  const Tensor filters = at::empty({block.filter_numel()}, options);
  float* const u = filters.mutable_data_ptr<float>();
  std::atomic<bool> taken = true;
  at::parallel_for(0, size.out / cpu::kWinogradUnit, 1, [&](int64_t first, int64_t last) {
    if (!Vectors::template run<cpu::winograd_filter<kLanes>>(std::cref(block), std::cref(filter), u, first, last))
      taken = false;
  });
  if (!taken) return false;
  const int64_t numel = block.workspace_numel(), blocks = (size.tiles() + block.kTiles - 1) / block.kTiles;
  const Tensor workspace = at::empty({std::min<int64_t>(at::get_num_threads(), blocks), numel}, options);
  float* const own = workspace.mutable_data_ptr<float>();
  std::atomic<bool> finite = true;
  at::parallel_for(0, size.tiles(), block.kTiles, [&](int64_t first, int64_t last) {
    float* const part = own + at::get_thread_num() * numel;
    const float* const made = u;
    if (!Vectors::template run<cpu::winograd_run<kLanes>>(std::cref(block), x, made, y, part, first, last))
      finite = false;
  });
  return finite;
}

Tensor convolved(Operator op, const Conv2dProblem& p, const Tensor& activation, const Tensor& weight) {
  const at::MemoryFormat format = layout_of(activation, weight);
  const cpu::Winograd size = size_of(op, p, format == kLast);
  const Tensor dense = activation.contiguous(format);
  const Tensor made = at::empty({size.n, size.out, size.p, size.q}, activation.options(), format);
  const auto compute = lanes() == 16 ? run<16> : run<8>;
  const bool holds = compute(size, filter_of(op, weight), dense.const_data_ptr<float>(), made.mutable_data_ptr<float>(),
                             activation.options());
  return holds ? made : Tensor();
}

}  // namespace

bool takes(Operator op, const Conv2dProblem& p, const Tensor& activation, const Tensor& weight) {
  const bool fits = p.r == 3 && p.s == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
                    p.dilation_w == 1 && p.groups == 1 && p.c % cpu::kWinogradUnit == 0 &&
                    p.k % cpu::kWinogradUnit == 0;
  if (!fits || lanes() == 0 || !activation.is_cpu()) return false;
  if (activation.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat) return false;
  const bool nhwc = layout_of(activation, weight) == kLast;
  const cpu::Winograd size = size_of(op, p, nhwc);
  if (!nhwc && (lanes() != 16 || size.out < kFewestNchwChannels)) return false;
  return size.p >= kFewest && size.q >= (nhwc ? kFewest : kFewestInNchwRow) &&
         size.tiles() >= std::max(kFewestTiles, p.c * p.k / (kFiltersForEachTile * lanes()));
}

Tensor conv2d(const Conv2dProblem& p, const Tensor& input, const Tensor& weight) {
  return convolved(Operator::fprop, p, input, weight);
}

Tensor dgrad(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  return convolved(Operator::dgrad, p, grad_output, weight);
}

}  // namespace freezekit::winograd
