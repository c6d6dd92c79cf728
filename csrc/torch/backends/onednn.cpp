#include "torch/backends/onednn.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>

#include "torch/common/constants.h"

namespace freezekit::onednn {
namespace {

using Scalars = c10::List<std::optional<at::Scalar>>;
using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, IntArrayRef, IntArrayRef,
                         IntArrayRef, int64_t, std::string_view, Scalars, std::optional<std::string_view>);
using PointwiseBinary = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, IntArrayRef,
                               IntArrayRef, IntArrayRef, int64_t, std::string_view, std::optional<at::Scalar>,
                               std::optional<std::string_view>, Scalars, std::optional<std::string_view>);
using Reorder = Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, at::OptionalIntArrayRef);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

Tensor run(const Tensor& input, const Tensor& packed, const Tensor& bias, const Tensor& residual,
           const std::array<int64_t, 2>& padding, const Geometry& g) {
  static const auto plain = find<Pointwise>("mkldnn::_convolution_pointwise");
  static const auto adding = find<PointwiseBinary>("mkldnn::_convolution_pointwise", "binary");
  // No ReLU of oneDNN's: it turns NaN into 0, torch's keeps it.
  // The adding operator takes no bias wider than the rest.
  const bool wide_bias = bias.defined() && bias.scalar_type() != input.scalar_type();
  if (!residual.defined() || wide_bias) {
    Tensor y = plain.call(input, packed, optional(bias), padding, ints(g.stride), ints(g.dilation), g.groups.expect_int(), "none", Scalars(),
                          std::nullopt);
    return residual.defined() ? y.add_(residual) : y;
  }
  return adding.call(input, residual, packed, optional(bias), padding, ints(g.stride), ints(g.dilation), g.groups.expect_int(), "add",
                     at::Scalar(1.0), std::nullopt, Scalars(), std::nullopt);
}

// The layout that oneDNN likes best depends on the input's size. The first size met decides; with another one oneDNN
// reorders inside the call, which is slower and no less right.
Tensor pack(const Tensor& filter, const std::array<int64_t, 2>& padding, const Geometry& g, IntArrayRef input_size) {
  static const auto reorder = find<Reorder>("mkldnn::_reorder_convolution_weight");
  return reorder.call(filter.contiguous(at::MemoryFormat::ChannelsLast), padding, ints(g.stride), ints(g.dilation), g.groups.expect_int(),
                      input_size);
}

Tensor rotated(const Tensor& w, int64_t groups) {
  const int64_t k = w.size(0) / groups, c = w.size(1), r = w.size(2), s = w.size(3);
  return w.view({groups, k, c, r, s}).transpose(1, 2).flip({3, 4}).reshape({groups * c, k, r, s});
}

std::array<int64_t, 2> rotated_padding(const Tensor& weight, const Geometry& g) {
  const auto padding = ints(g.padding), dilation = ints(g.dilation);
  return {dilation[0] * (weight.size(2) - 1) - padding[0], dilation[1] * (weight.size(3) - 1) - padding[1]};
}

// ATen gives float32 convolutions of one small image, and 1x1 ones with one thread, to its own GEMM. That begins within
// 5 us, where oneDNN takes 38 us to find its primitive and its memory (measured), and wins from about 8 million
// products.
bool aten_is_quicker(const Tensor& activation, const Tensor& weight, const Geometry& g) {
  constexpr int64_t kSmallImage = 20480, kSmallBatch = 16, kSmallWork = 8'000'000;  // the first two are ATen's own
  const Geometry::Pair ones = {1, 1};
  if (activation.scalar_type() != at::kFloat || g.groups != 1) return false;
  const int64_t batch = activation.size(0), taps = weight.size(2) * weight.size(3);
  const bool small_image = batch == 1 && activation.numel() <= kSmallImage && taps <= 9;
  const bool pointwise =
      at::get_num_threads() == 1 && taps == 1 && batch < kSmallBatch && g.stride == ones && g.dilation == ones;
  return (small_image || pointwise) && activation.numel() / activation.size(1) * weight.numel() < kSmallWork;
}

// By trying: whether a dtype runs depends on the processor and on how torch was built.
bool runs(at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  try {
    Geometry g;
    g.stride = {1, 1}, g.dilation = {1, 1};
    const Tensor filter = pack(at::zeros({16, 16, 1, 1}, options), {0, 0}, g, {1, 16, 2, 2});
    const Tensor x = at::zeros({1, 16, 2, 2}, options.memory_format(at::MemoryFormat::ChannelsLast));
    run(x, filter, {}, {}, {0, 0}, g);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

}  // namespace

bool takes(const Tensor& activation, const Tensor& weight, const Geometry& g) {
  if (!activation.is_cpu() || activation.numel() == 0 || !at::globalContext().userEnabledMkldnn()) return false;
  if (aten_is_quicker(activation, weight, g) || !constants::is_declared(weight)) return false;
  switch (activation.scalar_type()) {
    case at::kFloat: {
      static const bool f32 = runs(at::kFloat);
      return f32;
    }
    case at::kBFloat16: {
      static const bool bf16 = runs(at::kBFloat16);
      return bf16;
    }
    case at::kHalf: {
      static const bool f16 = runs(at::kHalf);
      return f16;
    }
    default:
      return false;
  }
}

bool has_unit_stride_dgrad(const Tensor& weight, const Geometry& g) {
  const auto padding = rotated_padding(weight, g);
  return g.stride[0] == 1 && g.stride[1] == 1 && padding[0] >= 0 && padding[1] >= 0;
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& residual,
              const Geometry& g) {
  const std::vector<int64_t> size = input.sizes().vec();
  const Tensor packed = constants::derived(weight, {"oneDNN filter", 0}, [g, size](const Tensor& w) {
    return pack(w, ints(g.padding), g, size);
  });
  return run(input, packed, bias, residual, ints(g.padding), g);
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& residual, const Geometry& g) {
  const auto padding = rotated_padding(weight, g);
  const std::vector<int64_t> size = grad_output.sizes().vec();
  const Tensor packed = constants::derived(weight, {"oneDNN filter of dgrad", 0}, [g, padding, size](const Tensor& w) {
    return pack(rotated(w.contiguous(), g.groups.expect_int()), padding, g, size);
  });
  return run(grad_output, packed, {}, residual, padding, g);
}

}  // namespace freezekit::onednn
