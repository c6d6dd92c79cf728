#include "torch/frozen_conv2d/fold.h"

#include <ATen/ops/empty.h>

#include "torch/common/checks.h"
#include "torch/backends/native.h"

namespace freezekit {
namespace {

ChannelVector channel_vector(const Tensor& tensor, const Tensor& weight, const char* name) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == weight.size(0), name, " must have size [", weight.size(0),
              "], one value an output channel, got ", tensor.sizes());
  TORCH_CHECK(tensor.device() == weight.device(), name, " is on ", tensor.device(), ", weight is on ",
              weight.device());
  return {tensor.const_data_ptr(), native::kernel_dtype(tensor)};
}

}  // namespace

std::tuple<Tensor, Tensor> fold_batch_norm(const Tensor& weight, const std::optional<Tensor>& bias,
                                           const FixedNorm& norm, Backend backend) {
  check_operand(weight, "weight");
  TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions, got ", weight.dim());
  const bool wide = weight.scalar_type() == at::kDouble;
  const Tensor folded = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  const Tensor shift = at::empty({weight.size(0)}, weight.options().dtype(wide ? at::kDouble : at::kFloat));
  BatchNormFold fold;
  std::vector<Tensor> dense;  // as long as the kernel is launched
  const auto vector = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor || !tensor->defined()) return ChannelVector();
    return channel_vector(dense.emplace_back(tensor->contiguous()), weight, name);
  };
  fold.mean = vector(norm.mean, "running_mean"), fold.var = vector(norm.var, "running_var");
  fold.gamma = vector(norm.gamma, "norm weight"), fold.beta = vector(norm.beta, "norm bias");
  fold.bias = vector(bias, "bias");
  fold.eps = norm.eps, fold.bias_out = shift.mutable_data_ptr();
  FilterTransform transform;
  transform.fold = &fold;
  native::transform_filter(transform, weight, /*groups=*/1, folded, backend);
  return {folded, shift};
}

}  // namespace freezekit
