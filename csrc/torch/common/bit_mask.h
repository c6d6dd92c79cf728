// One bit per element as a tensor of int32 words, laid out as core/mask.h says.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/common/operators.h"

namespace freezekit {

// Words for one bit per element of `like`.
Tensor empty_bits(const Tensor& like);
// The bits of a dense bool tensor in its memory order, by ATen: for devices and transforms that have no kernel here.
Tensor pack_bits(const Tensor& mask);
// As a bool tensor of these sizes; strides name the memory order of the bits.
Tensor unpack_bits(const Tensor& bits, SymIntArrayRef size, SymIntArrayRef stride);

}  // namespace freezekit
