// A batch norm with fixed statistics, as its live tensors: nothing is kept of what is made from them.
#pragma once

#include <ATen/core/Tensor.h>

namespace freezekit {

// All of size (K); gamma, beta and mean may be undefined: 1, 0, 0. Without var there is no norm.
struct FixedNormTensors {
  at::Tensor gamma, beta, mean, var;
  double eps = 0;

  bool defined() const { return var.defined(); }
};

}  // namespace freezekit
