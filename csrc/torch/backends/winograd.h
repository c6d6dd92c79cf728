// Convolutions of 3 x 3 at stride 1 on a CPU, in float32, with 16 multiplications where oneDNN takes 36
// (csrc/cpu/winograd.h). Filters are transformed at each call: nothing is kept.
//
// What changes is rounding: an error follows the largest input and the largest weight of its window, where direct
// convolution's follows the products. Where something is not finite, or overflows on the way, or filters lean on some of their
// weights, nothing is returned, and the direct way decides.
#pragma once

#include "torch/common/operators.h"

namespace freezekit::winograd {

// Whether this convolution, or dgrad, is faster this way, by sizes and by the processor.
bool takes(Operator, const Conv2dProblem&, const Tensor& activation, const Tensor& weight);

// In the layout that torch gives the result; undefined where the direct way decides.
Tensor conv2d(const Conv2dProblem&, const Tensor& input, const Tensor& weight);
Tensor dgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight);

}  // namespace freezekit::winograd
