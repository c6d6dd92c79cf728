// What is held against torch's operators before `auto` takes freezekit's kernels for the layers around convolutions.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/native_dropout_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <array>

#include "torch/backends/native_layers.h"
#include "torch/backends/own_values.h"
#include "torch/backends/proof.h"
#include "torch/common/bit_mask.h"

namespace freezekit::proof {
namespace {

// Of a tensor at least a GPU's share of DRAM traffic is timed.
constexpr int64_t kTimedBytes = 16 << 20;
// What is compared at least: blocks of threads and a rest, in which every value of x meets every one of dy.
constexpr int64_t kCompared = 16421;
// Of a tensor large enough, what is compared once more: what is made for that together is less than a result.
constexpr int64_t kShare = 16;

int64_t compared_of(const Tensor& x) {
  return std::clamp<int64_t>(x.numel() / kShare, kCompared, kTimedBytes / x.element_size());
}

// The first half of the elements in memory order, as one row: two results of it are as large as one of the layer's.
Tensor half_of(const Tensor& x) {
  const int64_t half = (x.numel() + 1) / 2;
  return x.as_strided({std::min<int64_t>(half, kTimedBytes / x.element_size())}, {1});
}

// The first of the texts that says something.
template <class... Checks>
std::string first_of(const Checks&... checks) {
  std::string text;
  static_cast<void>(((text = checks(), !text.empty()) || ...));
  return text;
}

Contest contest_of(std::function<std::string()> faults, std::function<void(Backend)> run, Backend candidate) {
  const auto check = [faults = std::move(faults), run, candidate] {
    std::string text = faults();
    if (text.empty()) run(Backend::aten), run(candidate);
    return text;
  };
  return {check, std::move(run)};
}

// An activation as torch has it.
struct Formula {
  const char* name;
  PiecewiseActivation f;

  Tensor value(const Tensor& x) const { return native::by_torch(f, x); }
  Tensor gradient(const Tensor& dy, const Tensor& x, const Tensor& y) const {
    if (f.kind == ActivationKind::relu) return at::threshold_backward(dy, y, 0);
    if (f.kind == ActivationKind::leaky_relu) return at::leaky_relu_backward(dy, x, f.a, /*self_is_result=*/false);
    const Tensor dx = at::hardtanh_backward(dy, x, f.a, f.b);
    return x.is_cpu() ? at::where(x.isnan(), dy, dx) : dx;  // vectors on a CPU stop what scalars and GPUs let through
  }
  Tensor passes(const Tensor& x) const {
    if (f.kind == ActivationKind::relu) return x.le(0).logical_not_();
    if (f.kind == ActivationKind::leaky_relu) return x.gt(0);
    const Tensor wide = x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);  // the ends are not rounded
    return wide.le(f.a).logical_or_(wide.ge(f.b)).logical_not_();
  }
};

constexpr Formula kRelu = {"relu", {}};
constexpr std::array<Formula, 4> kActivations = {{kRelu,
                                                  {"hardtanh", {ActivationKind::hardtanh, -0.3, 0.7}},
                                                  {"relu6", {ActivationKind::hardtanh, 0, 6}},
                                                  {"leaky_relu", {ActivationKind::leaky_relu, 0.01}}}};

// From element 0 on, out of place; from element 1 on, where no access is of 16 bytes, in place.
std::string fault_of(const Formula& formula, const Tensor& like, int64_t first, int64_t count = kCompared) {
  const auto& f = formula.f;
  const auto row = [&](const Tensor& table) { return repeated(table, {count + 1}).narrow(0, first, count); };
  const Tensor x = row(special_values(like, {f.a, f.b})), dy = row(special_values(like));
  const Tensor expected = formula.value(x), gradient = formula.gradient(dy, x, expected);
  const Tensor expected_bits = pack_bits(formula.passes(x)), bits = empty_bits(x);
  const Tensor y = first == 0 ? at::empty_like(x) : x, dx = first == 0 ? at::empty_like(dy) : dy;
  native::activation(f, x, y, bits);
  native::gate(gate_of(f), dy, bits, dx);
  const std::string text =
      first_of([&] { return difference(expected, y); }, [&] { return difference(expected_bits, bits); },
               [&] { return difference(gradient, dx); });
  return text.empty() ? text : std::string(formula.name) + ": " + text;
}

// The forward pass that draws is torch's own both times; a pass over x by the same mask stands for it.
constexpr double kScale = 1 / (1 - 0.1);

std::string fault_of_dropout(const Tensor& like, int64_t first, int64_t count = kCompared) {
  const Tensor x = repeated(special_values(like), {count + 1}).narrow(0, first, count);
  const Tensor numbers = at::arange(count, like.options().dtype(at::kInt));
  const Tensor mask = numbers.remainder(7).lt(numbers.remainder(5)), noise = mask.to(x.scalar_type());
  const Tensor expected = pack_bits(mask), of_bytes = empty_bits(mask), of_noise = empty_bits(mask);
  native::pack_bytes(mask, of_bytes);
  native::activation({}, noise, noise, of_noise);  // how it is drawn in place
  const Tensor scaled = at::native_dropout_backward(x, mask, kScale), dx = first == 0 ? at::empty_like(x) : x;
  native::gate({kScale, 0.0}, x, expected, dx);
  return first_of([&] { return difference(expected, of_bytes); }, [&] { return difference(expected, of_noise); },
                  [&] { return difference(scaled, dx); });
}

// A pool's window, the same on both axes, and the dtype of its taps.
struct Window {
  int64_t extent, stride, padding, dilation;
  at::ScalarType tap;

  int64_t output(int64_t input) const { return (input + 2 * padding - dilation * (extent - 1) - 1) / stride + 1; }
};
constexpr Window kCommon = {3, 2, 1, 1, at::kByte};

class Pool {
 public:
  Pool(const Tensor& x, const Window& window)
      : x_(x), window_(window), format_(x.suggest_memory_format()),
        size_({x.size(0), x.size(1), window.output(x.size(2)), window.output(x.size(3))}) {}

  MaxPool problem() const {
    const auto& [e, s, p, d, tap] = window_;
    return {{x_.size(2), x_.size(3), size_[2], size_[3], e, e, s, s, p, p, d, d},
            x_.size(0),
            x_.size(1),
            format_ == at::MemoryFormat::ChannelsLast,
            static_cast<int>(c10::elementSize(tap))};
  }

  std::pair<Tensor, Tensor> by_torch() const {
    const auto& [e, s, p, d, tap] = window_;
    const auto [y, indices] = at::max_pool2d_with_indices(x_, {e, e}, {s, s}, {p, p}, {d, d}, false);
    return {y, indices};
  }
  Tensor scattered_by_torch(const Tensor& dy, const Tensor& indices) const {
    const auto& [e, s, p, d, tap] = window_;
    return at::max_pool2d_with_indices_backward(dy, x_, {e, e}, {s, s}, {p, p}, {d, d}, false, indices);
  }

  std::pair<Tensor, Tensor> by_kernel() const {
    const Tensor y = at::empty(size_, x_.options(), format_);
    const Tensor taps = at::empty(size_, x_.options().dtype(window_.tap), format_);
    native::max_pool(problem(), x_, y, taps);
    return {y, taps};
  }
  Tensor scattered_by_kernel(const Tensor& dy, const Tensor& taps) const {
    const Tensor dx = at::empty(x_.sizes(), x_.options(), format_);
    native::max_pool_scatter(problem(), dy, taps, dx);
    return dx;
  }

  // The gather is the scatter's transpose: at its taps are the values that were taken.
  std::string fault_of_gather() const {
    const auto [y, taps] = by_kernel();
    const Tensor taken = at::empty_like(y);
    native::max_pool_gather(problem(), x_, taps, taken);
    return difference(y, taken);
  }
  std::string faults() const {
    const auto [expected, indices] = by_torch();
    const auto [y, taps] = by_kernel();
    // Small integers: sums of them are exact in every order and dtype.
    const Tensor dy = at::empty(size_, x_.options(), format_);
    dy.copy_(at::arange(dy.numel(), x_.options().dtype(at::kLong)).remainder_(7).view(size_));
    return first_of(
        [&, y = y] { return difference(expected, y); }, [&] { return fault_of_gather(); },
        [&, taps = taps] { return difference(scattered_by_torch(dy, indices), scattered_by_kernel(dy, taps)); });
  }

 private:
  Tensor x_;
  Window window_;
  at::MemoryFormat format_;
  std::array<int64_t, 4> size_;
};

// Images of the caller's own size, of small numbers.
std::string fault_of_large_pool(const Tensor& x, int64_t images) {
  if (images == 0) return {};
  const Tensor numbers = at::arange(23, x.options());
  return Pool(repeated(numbers, {images, x.size(1), x.size(2), x.size(3)}, x.suggest_memory_format()), kCommon)
      .faults();
}

std::string fault_of_pools(const Tensor& like) {
  const auto format = like.suggest_memory_format();
  constexpr std::array<int64_t, 4> size = {2, 8, 15, 14};
  const Tensor ties = values_with_ties(like), special = special_values(like);
  std::string text;
  for (const Window& window : {kCommon, Window{2, 2, 0, 1, at::kByte}, Window{3, 1, 1, 2, at::kByte}}) {
    for (const Tensor& table : {ties, special}) {
      if (text.empty()) text = Pool(repeated(table, size, format), window).faults();
    }
  }
  // Taps of two and of four bytes, for windows of more than 256 and 32768 places.
  for (const Window& window : {Window{17, 16, 8, 1, at::kShort}, Window{182, 181, 91, 1, at::kInt}}) {
    const std::array<int64_t, 4> images = {1, 2, window.extent + 5, window.extent + 3};
    if (text.empty()) text = Pool(repeated(ties, images, format), window).faults();
  }
  // Windows in which nothing is largest: torch's own kernel for NHWC takes the first place of the image there.
  const Tensor lowest = at::empty(size, like.options(), format).fill_(-std::numeric_limits<double>::infinity());
  return text.empty() ? Pool(lowest, kCommon).fault_of_gather() : text;
}

Backend candidate_for(const Tensor& x) { return *choices::candidate_on(x.device().type()); }

}  // namespace

bool is_dense(const Tensor& x) { return x.is_non_overlapping_and_dense(); }

bool is_image_batch(const Tensor& x) {
  return x.dim() == 4 && x.is_contiguous(x.suggest_memory_format()) &&
         fits_int32(Pool(x, {1, 1, 0, 1, at::kByte}).problem());
}

Contest activations(const Tensor& x) {
  const auto faults = [=] {
    std::string text;
    for (const int64_t first : {0, 1}) {
      for (const Formula& formula : kActivations) {
        if (text.empty()) text = fault_of(formula, x, first);
      }
    }
    const int64_t count = compared_of(x);
    return text.empty() && count > kCompared ? fault_of(kRelu, x, 0, count) : text;
  };
  const Tensor part = half_of(x);
  const auto run = [=](Backend on) {
    if (on == Backend::aten) {
      kRelu.gradient(part, part, kRelu.value(part));
      return;
    }
    const Tensor bits = empty_bits(part);
    native::activation(kRelu.f, part, at::empty_like(part), bits);
    native::gate(gate_of(kRelu.f), part, bits, at::empty_like(part));
  };
  return contest_of(faults, run, candidate_for(x));
}

Contest dropout(const Tensor& x) {
  const auto faults = [=] {
    const int64_t count = compared_of(x);
    return first_of([&] { return fault_of_dropout(x, 1); }, [&] { return fault_of_dropout(x, 0, count); });
  };
  const Tensor part = half_of(x), mask = at::ones(part.sizes(), part.options().dtype(at::kBool));
  const auto run = [=](Backend on) {
    at::native_dropout_backward(part, mask, kScale);  // stands for the pass that draws
    if (on == Backend::aten) {
      at::native_dropout_backward(part, mask, kScale);
      return;
    }
    const Tensor bits = empty_bits(part);
    native::pack_bytes(mask, bits);
    native::gate({kScale, 0.0}, part, bits, at::empty_like(part));
  };
  return contest_of(faults, run, candidate_for(x));
}

Contest max_pool2d(const Tensor& x) {
  const int64_t image = x.numel() / x.size(0) * x.element_size(), half = (x.size(0) + 1) / 2;
  const int64_t timed = std::clamp<int64_t>(kTimedBytes / image, 1, half);
  const Pool pool(x.narrow(0, 0, timed), kCommon);
  const auto run = [=](Backend on) {
    if (on == Backend::aten) {
      const auto [y, indices] = pool.by_torch();
      pool.scattered_by_torch(y, indices);
    } else {
      const auto [y, taps] = pool.by_kernel();
      pool.scattered_by_kernel(y, taps);
    }
  };
  const auto faults = [=] {
    return first_of([&] { return fault_of_pools(x); },
                    [&] { return fault_of_large_pool(x, std::min(timed, x.size(0) / kShare)); });
  };
  return contest_of(faults, run, candidate_for(x));
}

}  // namespace freezekit::proof
