// What is held against torch's convolution before `auto` takes a kernel of freezekit's for one.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <functional>
#include <string>
#include <string_view>

#include "kernels/api.h"
#include "torch/backends/own_values.h"
#include "torch/backends/proof.h"
#include "torch/common/operators.h"

namespace freezekit {

// One convolution on data: of an activation by a filter or, as wgrad, by another activation; `layout` is the result's;
// `variant` says what is computed beside the operator.
struct Conv2dStep {
  Operator op;
  const Conv2dProblem& problem;
  const Tensor& on;  // for dtype and device, too
  const Tensor& by;
  at::MemoryFormat layout;
  std::string_view variant = {};
  // What is added to a convolution: the largest factor and the largest further terms of a result. May be empty.
  struct Beside {
    double factor = 1, terms = 0;
  };
  std::function<Beside()> beside = {};
  // What is wrong beside the result of freezekit's kernel, which is given; nothing if all is right. May be empty.
  std::function<std::string(const Tensor&)> faults = {};
};

// The step by one backend: on the caller's tensors, and on values of a proof's own.
using Run = c10::function_ref<Tensor(Backend)>;
using Rehearse = c10::function_ref<Tensor(Backend, const proof::Rehearsal&)>;

namespace proof {

// One kernel has to give equal results on integers, where torch's are float32's, then on the caller's tensors.
Contest conv2d(const Conv2dStep&, const Selection&, Run, Rehearse);

}  // namespace proof
}  // namespace freezekit
