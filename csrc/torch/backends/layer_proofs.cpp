#include "torch/backends/layer_proofs.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/native_dropout_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include <algorithm>
#include <array>

#include "torch/backends/native_layers.h"
#include "torch/bits/gate.h"

namespace freezekit::proof {
namespace {

using Results = std::vector<Tensor>;

// Of a tensor at least a GPU's share of DRAM traffic is timed; what is only compared needs less.
constexpr int64_t kTimedBytes = 16 << 20;
constexpr int64_t kComparedElements = 1 << 18;

// The first elements in memory order, as one row.
Tensor row_of(const Tensor& x) {
  return x.as_strided({std::min<int64_t>(x.numel(), kTimedBytes / x.element_size())}, {1});
}

Results by_torch(const PiecewiseActivation& f, const Tensor& x, const Tensor& dy) {
  switch (f.kind) {
    case ActivationKind::relu: {
      const Tensor y = at::relu(x);
      return {y, at::threshold_backward(dy, y, 0)};
    }
    case ActivationKind::hardtanh:
      return {at::hardtanh(x, f.a, f.b), at::hardtanh_backward(dy, x, f.a, f.b)};
    default:
      return {at::leaky_relu(x, f.a), at::leaky_relu_backward(dy, x, f.a, /*self_is_result=*/false)};
  }
}

Results by_kernels(const PiecewiseActivation& f, const Tensor& x, const Tensor& dy) {
  const Tensor y = at::empty_like(x), dx = at::empty_like(x), bits = empty_bits(x);
  native::activation(f, x, y, bits);
  native::gate({1, f.kind == ActivationKind::leaky_relu ? std::optional<double>(f.a) : std::nullopt}, dy, bits, dx);
  return {y, dx};
}

std::string first_difference(const Results& expected, const Results& found) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const std::string text = difference(expected[i], found[i], 0);
    if (!text.empty()) return text;
  }
  return {};
}

// A pool's window, on both axes, and the dtype of its taps.
struct Window {
  int64_t extent, stride, padding;
  at::ScalarType tap;

  int64_t output(int64_t input) const { return (input + 2 * padding - extent) / stride + 1; }
};

MaxPool problem_of(const Tensor& x, const Window& window) {
  const auto& [e, s, p, tap] = window;
  const int64_t h = x.size(2), w = x.size(3);
  return {{h, w, window.output(h), window.output(w), e, e, s, s, p, p, 1, 1},
          x.size(0),
          x.size(1),
          x.suggest_memory_format() == at::MemoryFormat::ChannelsLast,
          static_cast<int>(c10::elementSize(tap))};
}

class Pool {
 public:
  Pool(const Tensor& x, const Window& window)
      : x_(x), window_(window), format_(x.suggest_memory_format()),
        size_({x.size(0), x.size(1), window.output(x.size(2)), window.output(x.size(3))}) {
    // Small integers: sums of them are exact in every order and dtype.
    dy_ = at::empty(size_, x.options(), format_);
    dy_.copy_(at::arange(dy_.numel(), x.options().dtype(at::kLong)).remainder_(7).view(size_));
  }

  Results by_torch() const {
    const auto& [e, s, p, tap] = window_;
    const auto [y, indices] = at::max_pool2d_with_indices(x_, {e, e}, {s, s}, {p, p}, {1, 1}, false);
    return {y, at::max_pool2d_with_indices_backward(dy_, x_, {e, e}, {s, s}, {p, p}, {1, 1}, false, indices)};
  }

  Results by_kernels() const { return {pooled().first, scattered(pooled().second)}; }

  // The gather is the scatter's transpose: at its taps are the values that were taken.
  std::string faults() const {
    const auto [y, taps] = pooled();
    const Tensor taken = at::empty_like(y);
    native::max_pool_gather(problem(), x_, taps, taken);
    const std::string text = difference(y, taken, 0);
    return text.empty() ? first_difference(by_torch(), {y, scattered(taps)}) : text;
  }

 private:
  MaxPool problem() const { return problem_of(x_, window_); }

  std::pair<Tensor, Tensor> pooled() const {
    const Tensor y = at::empty(size_, x_.options(), format_);
    const Tensor taps = at::empty(size_, x_.options().dtype(window_.tap), format_);
    native::max_pool(problem(), x_, y, taps);
    return {y, taps};
  }

  Tensor scattered(const Tensor& taps) const {
    const Tensor dx = at::empty(x_.sizes(), x_.options(), format_);
    native::max_pool_scatter(problem(), dy_, taps, dx);
    return dx;
  }

  Tensor x_, dy_;
  Window window_;
  at::MemoryFormat format_;
  std::array<int64_t, 4> size_;
};

}  // namespace

bool is_dense(const Tensor& x) { return x.is_non_overlapping_and_dense(); }

bool is_image_batch(const Tensor& x) {
  return x.dim() == 4 && x.is_contiguous(x.suggest_memory_format()) && fits_int32(problem_of(x, {1, 1, 0, at::kByte}));
}

Contest activations(const Tensor& x, Backend candidate) {
  const Tensor row = row_of(x), dy = row.abs().add_(1);  // no zeros: every bit shows
  Contest contest;
  contest.run = [=](Backend on) {
    const PiecewiseActivation relu;
    return on == candidate ? by_kernels(relu, row, dy) : by_torch(relu, row, dy);
  };
  contest.faults = [=](const Results&) {
    const int64_t count = std::min(row.numel(), kComparedElements);
    const Tensor part = row.narrow(0, 0, count), gradient = dy.narrow(0, 0, count);
    for (const PiecewiseActivation f : {PiecewiseActivation{ActivationKind::hardtanh, -0.5, 0.75},
                                        PiecewiseActivation{ActivationKind::leaky_relu, 0.01}}) {
      const std::string text = first_difference(by_torch(f, part, gradient), by_kernels(f, part, gradient));
      if (!text.empty()) return std::string(f.kind == ActivationKind::hardtanh ? "hardtanh: " : "leaky_relu: ") + text;
    }
    return std::string();
  };
  return contest;
}

// The forward pass that draws is torch's own both times; a pass over x by the same mask stands for it.
Contest dropout(const Tensor& x) {
  constexpr double kScale = 1 / (1 - 0.1);
  const Tensor row = row_of(x), mask = row.gt(0);
  Contest contest;
  contest.run = [=](Backend on) -> Results {
    const Tensor y = at::native_dropout_backward(row, mask, kScale);
    if (on == Backend::aten) return {y, at::native_dropout_backward(row, mask, kScale)};
    const Tensor bits = empty_bits(row), dx = at::empty_like(row);
    native::pack_bytes(mask, bits);
    native::gate({kScale, 0.0}, row, bits, dx);
    return {y, dx};
  };
  contest.faults = [=](const Results&) {
    const int64_t count = std::min(row.numel(), kComparedElements);
    const Tensor kept = mask.narrow(0, 0, count), noise = kept.to(row.scalar_type());
    const Tensor of_bytes = empty_bits(kept), of_noise = empty_bits(kept);  // the latter is how it is drawn in place
    native::pack_bytes(kept, of_bytes);
    native::activation({}, noise, noise, of_noise);
    return difference(of_bytes, of_noise, 0);
  };
  return contest;
}

Contest max_pool2d(const Tensor& x) {
  const int64_t image = x.numel() / x.size(0) * x.element_size();
  const Tensor images = x.narrow(0, 0, std::clamp<int64_t>(kTimedBytes / image, 1, x.size(0)));
  const Pool pool(images, {3, 2, 1, at::kByte});
  Contest contest;
  contest.run = [=](Backend on) { return on == Backend::aten ? pool.by_torch() : pool.by_kernels(); };
  contest.faults = [=](const Results&) {
    std::string text = pool.faults();
    // Taps of two and of four bytes, for windows of more than 256 and 32768 places.
    const auto format = x.suggest_memory_format();
    const Tensor corner = x.narrow(0, 0, 1).narrow(1, 0, std::min<int64_t>(x.size(1), 8)).contiguous(format);
    for (const Window window : {Window{17, 16, 8, at::kShort}, Window{182, 181, 91, at::kInt}}) {
      if (text.empty()) text = Pool(corner, window).faults();
    }
    return text;
  };
  return contest;
}

}  // namespace freezekit::proof
