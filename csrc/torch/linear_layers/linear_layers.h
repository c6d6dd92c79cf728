// Layers that are linear in their input, for whoever calls them instead of their operators: what the operators do where
// autograd has its turn.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/common/operators.h"

namespace freezekit {

Tensor record_avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                       bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor);
Tensor record_adaptive_avg_pool(const Tensor& input, SymIntArrayRef output_size);
Tensor record_reflection_pad(const Tensor& input, SymIntArrayRef padding);
Tensor record_replication_pad(const Tensor& input, SymIntArrayRef padding);

}  // namespace freezekit
