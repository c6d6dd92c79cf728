// The memory format that a convolution's result has: ATen's rule, channels_last if either operand is.
#pragma once

#include <ATen/core/Tensor.h>

namespace freezekit {

inline at::MemoryFormat layout_of(const at::Tensor& a, const at::Tensor& b) {
  const bool channels_last = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// `tensor` laid out so that layout_of reads `format` from it, copied only where it must be. Sizes of 1 let one block of
// memory be both formats: contiguous() then leaves the strides as they are, and they tell the other format.
inline at::Tensor in_layout(const at::Tensor& tensor, at::MemoryFormat format) {
  // Neither vmap, torch.func's nor the one behind is_grads_batched, knows memory formats.
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  if (tensor.key_set().has_any(batched)) return tensor;
  const at::Tensor dense = tensor.contiguous(format);
  return dense.suggest_memory_format() == format ? dense : dense.clone(format);
}

// Whether a tensor of four axes has exactly the strides of `format`, along axes of size 1 as well.
inline bool is_laid_out(const at::Tensor& tensor, at::MemoryFormat format) {
  constexpr int rows[] = {3, 2, 1, 0}, pixels[] = {1, 3, 2, 0};  // innermost first
  int64_t step = 1;
  for (const int axis : format == at::MemoryFormat::ChannelsLast ? pixels : rows) {
    if (tensor.stride(axis) != step) return false;
    step *= tensor.size(axis);
  }
  return true;
}

// A result that nobody else holds yet, with exactly the strides of `format`.
inline at::Tensor finish(at::Tensor result, at::MemoryFormat format) {
  if (result.layout() != at::kStrided || is_laid_out(result, format)) return result;
  if (!result.is_contiguous(format)) return result.contiguous(format);
  result.unsafeGetTensorImpl()->empty_tensor_restride(format);
  return result;
}

}  // namespace freezekit
