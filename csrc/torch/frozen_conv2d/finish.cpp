#include "torch/frozen_conv2d/finish.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <functional>

#include "core/mask.h"
#include "cpu/finish.h"
#include "cpu/simd.h"
#include "torch/backends/cpu_formats.h"
#include "torch/backends/native.h"

namespace freezekit {
namespace {

constexpr int64_t kWordsPerPass = 512;

// Whether a tensor that is NCHW or NHWC is the latter. Sizes of 1 may make it both, which is then the same.
bool is_nhwc(const Tensor& dense) {
  if (dense.is_contiguous()) return false;
  TORCH_INTERNAL_ASSERT(dense.is_contiguous(at::MemoryFormat::ChannelsLast));
  return true;
}

// The channels of a tensor as the passes read them, and the memory that they are in.
template <class T>
class Channels {
 public:
  using C = cpu::Compute<T>;

  Channels(const Tensor& scale, const Tensor& shift, const Tensor& dense) {
    const bool nhwc = is_nhwc(dense);
    affine_.channels = dense.size(1), affine_.plane = nhwc ? 1 : dense.size(2) * dense.size(3);
    const int64_t count = affine_.channels + (affine_.plane == 1 ? 31 : 0);
    scale_ = spread(scale, count, 1), shift_ = spread(shift, count, 0);
    affine_.scale = scale_.data(), affine_.shift = shift_.data();
  }

  const cpu::ChannelAffine<T>& affine() const { return affine_; }

 private:
  std::vector<C> spread(const Tensor& vector, int64_t count, C otherwise) const {
    std::vector<C> values(count, otherwise);
    if (!vector.defined()) return values;
    const Tensor dense = vector.to(c10::CppTypeToScalarType<C>::value).contiguous();
    const C* from = dense.const_data_ptr<C>();
    for (int64_t i = 0; i < count; ++i) values[i] = from[i < affine_.channels ? i : i % affine_.channels];
    return values;
  }

  std::vector<C> scale_, shift_;
  cpu::ChannelAffine<T> affine_{};
};

std::vector<double> numbers(const Tensor& vector, int64_t count, double otherwise) {
  std::vector<double> values(count, otherwise);
  if (!vector.defined()) return values;
  const Tensor dense = vector.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dense.scalar_type(), "freezekit::norm", [&] {
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(from[i]);
  });
  return values;
}

Affine affine_on_cpu(const FixedNormTensors& norm, const Tensor& bias, at::ScalarType wide) {
  const int64_t count = norm.var.size(0);
  const auto gamma = numbers(norm.gamma, count, 1), beta = numbers(norm.beta, count, 0);
  const auto mean = numbers(norm.mean, count, 0), var = numbers(norm.var, count, 1), before = numbers(bias, count, 0);
  Affine made = {at::empty({count}, norm.var.options().dtype(wide)),
                 at::empty({count}, norm.var.options().dtype(wide))};
  AT_DISPATCH_FLOATING_TYPES(wide, "freezekit::norm", [&] {
    scalar_t* const scale = made.scale.mutable_data_ptr<scalar_t>();
    scalar_t* const shift = made.shift.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < count; ++i) {
      // Added as torch adds them: whether the sum is 0 decides between infinity and a large number.
      const double sum = static_cast<scalar_t>(var[i]) + static_cast<scalar_t>(norm.eps);
      scale[i] = static_cast<scalar_t>(gamma[i] / std::sqrt(sum));
      shift[i] = static_cast<scalar_t>(beta[i] + (before[i] - mean[i]) * scale[i]);
      made.is_finite = made.is_finite && std::isfinite(scale[i]);
    }
  });
  return made;
}

template <class T, bool kResidual>
void finish_as(FrozenConv2d::Activation activation, T* y, const T* residual, uint32_t* bits,
               const cpu::ChannelAffine<T>& affine, int64_t numel, int64_t first, int64_t last) {
  using C = cpu::Compute<T>;
  const auto run = [&]<class Rule>(Rule rule) {
    cpu::in_vectors<cpu::finish<kResidual, T, Rule>>(y, residual, bits, std::cref(affine), numel, first, last, rule);
  };
  switch (activation) {
    case FrozenConv2d::Activation::none:
      return run(cpu::Identity<T>{});
    case FrozenConv2d::Activation::relu:
      return run(cpu::Relu<T>{});
    case FrozenConv2d::Activation::relu6:
      return run(cpu::Hardtanh<T>{C(0), C(kRelu6End), C(0), C(kRelu6End)});
  }
}

}  // namespace

Affine affine_of(const FixedNormTensors& norm, const Tensor& bias, const Tensor& like, Backend on) {
  if (!norm.defined()) return {Tensor(), bias};
  if (is_own(on)) {
    const auto [scale, shift] = native::norm_affine(norm, bias, like, on);
    return {scale, shift};
  }
  const auto wide = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (like.is_cpu()) return affine_on_cpu(norm, bias, wide);
  const auto in = [&](const Tensor& tensor) { return tensor.to(wide); };
  Tensor scale = in(norm.var).add(norm.eps).rsqrt();
  if (norm.gamma.defined()) scale = scale * in(norm.gamma);
  Tensor shift = norm.mean.defined() ? in(norm.mean).neg() : at::zeros_like(scale);
  if (bias.defined()) shift = shift + in(bias);
  shift = shift * scale;
  return {scale, norm.beta.defined() ? shift + in(norm.beta) : shift};
}

bool bends_at_zero(FrozenConv2d::Activation activation, const Affine& affine) {
  if (activation == FrozenConv2d::Activation::none) return false;
  if (!affine.shift.defined()) return true;
  const std::vector<double> shifts = numbers(affine.shift, affine.shift.numel(), 0);
  return std::any_of(shifts.begin(), shifts.end(), [activation](double shift) {
    return shift == 0 || (activation == FrozenConv2d::Activation::relu6 && shift == kRelu6End);
  });
}

Tensor finish_(Tensor& y, const Affine& affine, const Tensor& residual, FrozenConv2d::Activation activation,
               bool keep_mask) {
  const int64_t numel = y.numel();
  const bool wanted = keep_mask && activation != FrozenConv2d::Activation::none;
  const Tensor bits = at::empty({wanted ? mask_words(numel) : 0}, y.options().dtype(at::kInt));
  auto* const words = wanted ? reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>()) : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "freezekit::frozen_conv2d", [&] {
    const Channels<scalar_t> channels(affine.scale, affine.shift, y);
    scalar_t* const to = y.mutable_data_ptr<scalar_t>();
    const scalar_t* const added = residual.defined() ? residual.const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, mask_words(numel), kWordsPerPass, [&](int64_t first, int64_t last) {
      const auto run = added ? finish_as<scalar_t, true> : finish_as<scalar_t, false>;
      run(activation, to, added, words, channels.affine(), numel, first, last);
    });
  });
  return bits;
}

Tensor scale_back(const Tensor& dy, const Tensor& bits, const Tensor& scale) {
  const Tensor out = at::empty_like(dy);
  const int64_t numel = dy.numel();
  const auto* const words =
      bits.defined() ? reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>()) : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dy.scalar_type(), "freezekit::frozen_conv2d_dgrad", [&] {
    const Channels<scalar_t> channels(scale, Tensor(), dy);
    const scalar_t* const from = dy.const_data_ptr<scalar_t>();
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, mask_words(numel), kWordsPerPass, [&](int64_t first, int64_t last) {
      const auto affine = std::cref(channels.affine());
      cpu::in_vectors<cpu::scale_back<scalar_t>>(from, to, words, affine, numel, first, last);
    });
  });
  return out;
}

}  // namespace freezekit
