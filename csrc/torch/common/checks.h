// Checked once, at the torch boundary: what a call must satisfy before any kernel sees it. Sizes and settings may be
// symbolic, while a graph is traced; what cannot be known then is checked when the call has data.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include "torch/common/operators.h"

namespace freezekit {

using SizeVector = c10::SmallVector<c10::SymInt, 4>;

// No settings below reach the end of int64 in any product that a check or a kernel forms: a wrong size must not wrap.
constexpr int64_t kExtentLimit = int64_t{1} << 31;

// A defined tensor of a layout that convolutions exist for.
void check_operand(const Tensor&, const char* name);
// Two operands of one device and one dtype.
void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);
void check_rank(SymIntArrayRef size, const char* name, const char* axes);
void check_bias(SymIntArrayRef bias, SymIntArrayRef weight);
void check_floating(const Tensor&, const char* name);

// The whole check of each operator. conv2d's returns the output size (N, K, P, Q).
SizeVector check_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
// Whether that check passes a call on data that nothing sees (is_unseen), told sooner; false where it may not. The bias may
// be undefined.
bool is_sound_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Geometry&);
void check_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry&);
void check_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry&);

}  // namespace freezekit
