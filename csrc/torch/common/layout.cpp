#include "torch/common/layout.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>

#include <optional>

#include "torch/common/unseen.h"

namespace freezekit {
namespace {

// The format that x is in, the first of those that torch's TensorIterator asks for.
std::optional<at::MemoryFormat> dense_format(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  if (x.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  return std::nullopt;
}

}  // namespace

at::Tensor empty_elementwise(const at::Tensor& x) {
  if (const auto format = dense_format(x)) return empty_beside(x, x.sym_sizes(), *format, x.scalar_type());
  if (x.is_non_overlapping_and_dense()) return empty_beside(x, x.sym_sizes(), x.sym_strides(), x.scalar_type());
  return at::empty_like(x);
}

bool is_elementwise(const at::Tensor& result, const at::Tensor& x) {
  if (const auto format = dense_format(x)) return is_laid_out(result, *format);
  if (x.is_non_overlapping_and_dense()) return result.strides() == x.strides();
  return result.strides() == at::IntArrayRef(at::infer_dense_strides(x.sizes(), x.strides()));
}

at::Tensor finish_elementwise(at::Tensor result, c10::ArrayRef<at::Tensor> operands) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).add_owned_output(at::Tensor());
  for (const at::Tensor& operand : operands) config.add_owned_const_input(operand);
  const at::Tensor like_torch = config.build().output();
  return restride(result, like_torch.strides()) ? result : like_torch.copy_(result);
}

}  // namespace freezekit
