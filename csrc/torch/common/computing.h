// What operators that compute on data share: the problem in plain numbers, and a way to call ATen from below autograd.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "torch/common/operators.h"

namespace freezekit {

// Calling ATen from a kernel would enter Autograd and Autocast again: autocast would cast what it already has cast.
struct BelowAutogradAndAutocast {
  c10::impl::ExcludeDispatchKeyGuard autograd{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// Of sizes that were checked against each other.
inline Conv2dProblem problem_of(IntArrayRef x, IntArrayRef w, IntArrayRef y, const Geometry& g) {
  Conv2dProblem problem;
  problem.n = x[0], problem.c = x[1], problem.h = x[2], problem.w = x[3];
  problem.k = w[0], problem.r = w[2], problem.s = w[3];
  problem.p = y[2], problem.q = y[3];
  problem.pad_h = g.padding[0].expect_int(), problem.pad_w = g.padding[1].expect_int();
  problem.stride_h = g.stride[0].expect_int(), problem.stride_w = g.stride[1].expect_int();
  problem.dilation_h = g.dilation[0].expect_int(), problem.dilation_w = g.dilation[1].expect_int();
  problem.groups = g.groups.expect_int();
  return problem;
}

}  // namespace freezekit
