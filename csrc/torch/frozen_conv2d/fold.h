// A frozen convolution's weight and bias with the batch norm behind it folded in, by one launch of freezekit's kernels.
//
//   s = gamma / sqrt(var + eps);  w' = w * s;  b' = beta + (b - mean) * s,  in fp64, rounded once
#pragma once

#include <optional>
#include <tuple>

#include "torch/common/operators.h"

namespace freezekit {

struct FixedNorm {
  Tensor mean, var;
  std::optional<Tensor> gamma, beta;
  double eps;
};

// (w', b'): w' has weight's dtype and is channels_last, as the kernels read filters; b' is what they accumulate in.
std::tuple<Tensor, Tensor> fold_batch_norm(const Tensor& weight, const std::optional<Tensor>& bias, const FixedNorm&,
                                           Backend);

}  // namespace freezekit
