// What the kernels must give: the sums of csrc/core/problem.h, term by term, in double precision.
#pragma once

#include <cstddef>
#include <vector>

#include "core/problem.h"

// first, second: x and filter (fprop), dy and filter (dgrad), dy and x (wgrad); NHWC, KRSC.
std::vector<double> conv_reference(freezekit::Operator op, const freezekit::Conv2dProblem& p,
                                   const std::vector<double>& first, const std::vector<double>& second);
