// How torch lays out what operators make. Callers see it: a `.view` that stock allows must not fail.
//
// Along axes of size 1, too, strides are torch's: of a tensor with one channel, one row or one pixel they tell its format.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace freezekit {

// The memory format of a convolution's result: ATen's rule, channels_last if either operand is.
inline at::MemoryFormat layout_of(const at::Tensor& a, const at::Tensor& b) {
  const auto format = a.suggest_memory_format();
  return format == at::MemoryFormat::Contiguous ? b.suggest_memory_format() : format;
}

inline at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The memory format that torch's batch norm and elementwise operators give what they make of a tensor of this size in
// `format`. They ask for NCHW first, and one block of memory may be both.
inline at::MemoryFormat elementwise_format(at::MemoryFormat format, c10::SymIntArrayRef size) {
  const bool both = size[1] == 1 || (size[2] == 1 && size[3] == 1);
  return both ? at::MemoryFormat::Contiguous : format;
}

// Whether vmap, torch.func's or the one behind is_grads_batched, has hold of a tensor: neither knows memory formats.
inline bool is_batched(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return tensor.key_set().has_any(batched);
}

// `tensor` laid out so that layout_of reads `format` from it, copied only where it must be. Sizes of 1 let one block of
// memory be both formats: contiguous() then leaves the strides as they are, and they tell the other format.
inline at::Tensor in_layout(const at::Tensor& tensor, at::MemoryFormat format) {
  if (is_batched(tensor)) return tensor;
  at::Tensor dense = tensor.contiguous(format);
  if (dense.suggest_memory_format() == format) return dense;
  return dense.clone(format);
}

// Whether a tensor is known to have no elements. Freezekit saves nothing there, and torch gives the gradient of an empty
// input of a convolution the input's own strides.
inline bool is_empty(const at::Tensor& tensor) { return tensor.sym_numel().maybe_as_int() == 0; }

// Whether a tensor has exactly the strides of `format`.
inline bool is_laid_out(const at::Tensor& tensor, at::MemoryFormat format) {
  const bool by_pixels = format != at::MemoryFormat::Contiguous;
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  int64_t step = 1;
  const auto is_next = [&](int64_t axis) {  // from the innermost outwards
    const bool fits = strides[axis] == step;
    step *= std::max<int64_t>(sizes[axis], 1);
    return fits;
  };
  if (by_pixels && !is_next(1)) return false;
  for (int64_t axis = static_cast<int64_t>(sizes.size()) - 1; axis >= 0; --axis) {
    if (!(by_pixels && axis == 1) && !is_next(axis)) return false;
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

// Whether a tensor's elements are where those with these strides are.
inline bool is_in_place(const at::Tensor& tensor, at::IntArrayRef strides) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != strides[i]) return false;
  }
  return true;
}

// Gives these strides to a result that nobody else holds yet, if that moves none of its elements.
inline bool restride(const at::Tensor& result, at::IntArrayRef strides) {
  if (!is_in_place(result, strides)) return false;
  if (result.strides() != strides) result.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), strides);
  return true;
}

// An empty tensor as torch's elementwise operators lay out what they make of x, and whether one that is not empty is.
at::Tensor empty_elementwise(const at::Tensor& x);
bool is_elementwise(const at::Tensor& result, const at::Tensor& x);

// A result that nobody else holds yet, as torch's elementwise operators lay out what they make of `operands`, which
// broadcast to its size.
at::Tensor finish_elementwise(at::Tensor result, c10::ArrayRef<at::Tensor> operands);

}  // namespace freezekit
