// The parts of freezekit._C, one a file.
#pragma once

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace freezekit {

void bind_blocks(py::module_& parent);
void bind_chains(py::module_& parent);
void bind_choices(py::module_& parent);
void bind_enable(py::module_& parent);
void bind_quick(py::module_& parent);
void bind_tiles(py::module_& parent);

}  // namespace freezekit
