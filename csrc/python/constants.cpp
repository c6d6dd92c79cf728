// freezekit._C.constants: the constant cache, seen from Python.
#include "torch/common/constants.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "python/bindings.h"

namespace freezekit {

void bind_constants(py::module_& parent) {
  py::module_ m = parent.def_submodule("constants", "What is made from weights that were declared constant.");
  m.def("declare", &constants::declare, py::arg("source"));
  m.def("is_declared", &constants::is_declared, py::arg("source"));
  m.def("withdraw", &constants::withdraw, py::arg("source"));
  m.def("invalidate", &constants::invalidate, py::arg("source"));
  m.def("stale", &constants::stale, py::arg("source"), py::call_guard<py::gil_scoped_release>());
  m.def("usage", [] {
    const constants::Usage usage = constants::usage();
    py::dict result;
    result["declared"] = usage.declared;
    result["cached"] = usage.cached;
    result["bytes"] = usage.bytes;
    result["hits"] = usage.hits;
    result["misses"] = usage.misses;
    return result;
  });
}

}  // namespace freezekit
