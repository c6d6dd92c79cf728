// freezekit._C.enable: the switch that puts freezekit's kernels on torch's own operators.
#include "torch/enable/enable.h"

#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "python/bindings.h"
#include "torch/lossy/lossy.h"

namespace freezekit {
namespace {

// The Python function that tells; held for good, as autograd's threads may ask while the interpreter ends.
PyObject* is_compiled = nullptr;

bool ask_python(const at::Tensor& tensor) {
  const py::gil_scoped_acquire gil;
  return py::cast<bool>(py::handle(is_compiled)(tensor));
}

void set_is_compiled(const py::object& predicate) {
  is_compiled = py::object(predicate).release().ptr();
  enable::set_is_compiled(ask_python);
}

}  // namespace

void bind_enable(py::module_& parent) {
  py::module_ m = parent.def_submodule("enable", "The switch that puts freezekit's kernels on torch's own operators.");
  m.def(
      "set_is_compiled", set_is_compiled, py::arg("predicate"),
      "Says who tells whether a tensor is of a class of torch's that stands for others in what torch.compile traces.");
  m.def("on", enable::enable, "Registers the kernels; the operators that another library has taken.");
  m.def("off", enable::disable, "Takes the kernels out again.");
  m.def("set_watched", enable::set_watched, py::arg("watched"),
        "Whether this thread's dispatch modes are freezekit's own, which want to see what freezekit does.");
  m.def("set_bits", lossy::set_bits, py::arg("bits"),
        "In how many bits derivatives of activations are kept, 8 or 4; 0 leaves all of them exact.");
  m.def("is_lossy", lossy::is_shown, "Whether a hook on saved tensors is given a derivative in few bits.");
  m.def("operators", enable::operators, "The operators of aten that have a stand-in.");
}

}  // namespace freezekit
