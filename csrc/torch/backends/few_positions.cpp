#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <vector>

#include "cpu/few_rows.h"
#include "torch/backends/few.h"
#include "torch/common/lanes.h"
#include "torch/common/layout.h"

namespace freezekit::few_positions {
namespace {

// With AVX2. From about 20 positions on, oneDNN's reorder is paid for. Of a filter that stays in the caches it is cheap: there
// only a handful of positions is faster forward. (Measured with one thread, 1 to 256 positions; at 64 this took 1.1 to 1.8 of
// oneDNN's time.)
constexpr int64_t kMostPositions = 16, kFewest = 4, kLargeFilter = 1 << 18, kMostTaps = cpu::kStreamed / kMostPositions;

// With AVX-512, in channels_last, or where columns are made from other orders; and of 1 x 1, whose columns are the input's.
// Beyond it is Winograd's way that is faster, or oneDNN's. Short sums are not worth adding up their lanes, and few input
// channels fill no vectors of dx. (Measured with one thread on a Zen 5, 8 to 2048 channels, 1 x 1 to 5 x 5, 1 and 8 images, 4 to
// 3136 positions: 0.3 to 1.05 of torch's time within these bounds, half of it 0.6 and less; up to 2 beyond.)
constexpr int64_t kMostInNhwc = 196, kMostInNchw = 64, kMostOfPlain = 4096, kShortestSum = 128, kFewestInputs = 32;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

int64_t rows_of(const Conv2dProblem& p) { return p.n * p.p * p.q; }

// Columns are the input's own rows, each read once.
bool is_plain(const Conv2dProblem& p) {
  return p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

bool is_worth_it(Operator op, const Conv2dProblem& p, bool nhwc, int64_t weight_numel) {
  const int64_t rows = rows_of(p);
  if (lanes() != 16) {
    return rows <= kMostPositions && p.r * p.s <= kMostTaps &&
           (op == Operator::dgrad || rows <= kFewest || weight_numel >= kLargeFilter);
  }
  if (rows > (!nhwc ? kMostInNchw : is_plain(p) ? kMostOfPlain : kMostInNhwc)) return false;
  return op == Operator::dgrad ? p.c >= kFewestInputs : rows <= kFewest || p.c * p.r * p.s >= kShortestSum;
}

// What the kernels read: the filter's order, and which inputs in NHWC a position's taps meet.
class Positions {
 public:
  Positions(const Conv2dProblem& p, const Tensor& weight) : places_(rows_of(p) * p.r * p.s) {
    const bool taps_outside = weight.is_contiguous(kLast);  // KRSC, else KCRS
    size_ = {rows_of(p), p.k, p.r * p.s, p.c, taps_outside ? p.c : 1, taps_outside ? 1 : p.r * p.s, places_.data(), 0};
    size_.chunk = cpu::chunk_of(size_);
    int64_t* place = places_.data();
    for (int64_t m = 0; m < size_.rows; ++m) {
      const int64_t n = m / (p.p * p.q), row = m / p.q % p.p, column = m % p.q;
      for (int64_t r = 0; r < p.r; ++r) {
        const int64_t h = row * p.stride_h - p.pad_h + r * p.dilation_h;
        for (int64_t s = 0; s < p.s; ++s) {
          const int64_t w = column * p.stride_w - p.pad_w + s * p.dilation_w;
          const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
          *place++ = inside ? ((n * p.h + h) * p.w + w) * p.c : -1;
        }
      }
    }
  }

  const cpu::FewRows& size() const { return size_; }
  cpu::FewRows part(int64_t first, int64_t last) const {
    cpu::FewRows part = size_;
    part.rows = last - first, part.places += first * size_.taps;
    return part;
  }

 private:
  std::vector<int64_t> places_;
  cpu::FewRows size_;
};

// By the kernel for this processor's vectors.
template <class... Arguments>
void products(Arguments... arguments) {
  if (lanes() == 16) return cpu::InVectorsOf<16>::run<cpu::products<16>>(arguments...);
  cpu::in_vectors<cpu::products<8>>(arguments...);
}
template <class... Arguments>
void combinations(Arguments... arguments) {
  if (lanes() == 16) return cpu::InVectorsOf<16>::run<cpu::combinations<16>>(arguments...);
  cpu::in_vectors<cpu::combinations<8>>(arguments...);
}

}  // namespace

bool takes(Operator op, const Conv2dProblem& p, const Tensor& activation, const Tensor& weight) {
  const bool dense = weight.is_contiguous() || weight.is_contiguous(kLast);
  return activation.is_cpu() && activation.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && dense &&
         p.groups == 1 && p.x_numel() > 0 && rows_of(p) > 0 &&
         is_worth_it(op, p, layout_of(activation, weight) == kLast, weight.numel());
}

Tensor conv2d(const Conv2dProblem& p, const Tensor& input, const Tensor& weight) {
  const Positions positions(p, weight);
  const cpu::FewRows& size = positions.size();
  const Tensor dense = input.contiguous(kLast), y = at::zeros({p.n, p.p, p.q, p.k}, input.options());
  const float *const x = dense.const_data_ptr<float>(), *const w = weight.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  // Threads take positions, or of few of them channels, so that each reads a part of the filter.
  const bool by_rows = size.rows >= cpu::kBlock * at::get_num_threads();
  const int64_t cost = size.length() * (by_rows ? size.channels : size.rows);
  const int64_t grain = std::max<int64_t>(by_rows ? cpu::kBlock : 4, at::internal::GRAIN_SIZE / cost);
  at::parallel_for(0, by_rows ? size.rows : size.channels, grain, [&](int64_t first, int64_t last) {
    if (by_rows) {
      const cpu::FewRows part = positions.part(first, last);
      products(std::cref(part), x, w, to + first * size.channels, int64_t{0}, size.channels);
    } else {
      products(std::cref(size), x, w, to, first, last);
    }
  });
  return y.permute({0, 3, 1, 2});
}

Tensor dgrad(const Conv2dProblem& p, const Tensor& grad_output, const Tensor& weight) {
  const Positions positions(p, weight);
  const cpu::FewRows& size = positions.size();
  const Tensor dense = grad_output.contiguous(kLast), dx = at::zeros({p.n, p.h, p.w, p.c}, grad_output.options());
  const float *const dy = dense.const_data_ptr<float>(), *const w = weight.const_data_ptr<float>();
  float* const to = dx.mutable_data_ptr<float>();
  // Threads take positions if these do not share inputs, else input channels: whole tiles of them where an input's taps are
  // side by side, since the order in which these are added follows from the tiles.
  const bool by_rows = is_plain(p) && size.rows >= cpu::kBlock * at::get_num_threads();
  const int64_t unit = by_rows ? cpu::kBlock : size.input_step == 1 ? 16 : cpu::kWidestTile;
  const int64_t count = by_rows ? size.rows : size.inputs;
  const int64_t cost = unit * size.channels * size.taps * (by_rows ? size.inputs : size.rows);
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / cost);
  at::parallel_for(0, (count + unit - 1) / unit, grain, [&](int64_t from, int64_t to_unit) {
    const int64_t first = from * unit, last = std::min(count, to_unit * unit);
    if (by_rows) {
      const cpu::FewRows part = positions.part(first, last);
      combinations(std::cref(part), dy + first * size.channels, w, to, int64_t{0}, size.inputs);
    } else {
      combinations(std::cref(size), dy, w, to, first, last);
    }
  });
  return dx.permute({0, 3, 1, 2});
}

}  // namespace freezekit::few_positions
