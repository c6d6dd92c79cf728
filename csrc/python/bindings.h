// The parts of freezekit._C, one a file.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "core/problem.h"

namespace py = pybind11;

namespace freezekit {

using Sizes = std::array<int64_t, 4>;
using Pair = std::array<int64_t, 2>;  // (height, width)

// Raises ValueError where these make no convolution.
Conv2dProblem make_problem(const Sizes& input, const Sizes& weight, const Pair& stride, const Pair& padding,
                           const Pair& dilation, int64_t groups);

void bind_blocks(py::module_& parent);
void bind_chains(py::module_& parent);
void bind_choices(py::module_& parent);
void bind_enable(py::module_& parent);
void bind_quick(py::module_& parent);
void bind_tiles(py::module_& parent);

}  // namespace freezekit
