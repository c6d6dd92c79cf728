// The memory format that a convolution's result has: ATen's rule, channels_last if either operand is.
#pragma once

#include <ATen/core/Tensor.h>

namespace freezekit {

inline at::MemoryFormat layout_of(const at::Tensor& a, const at::Tensor& b) {
  const bool channels_last = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace freezekit
