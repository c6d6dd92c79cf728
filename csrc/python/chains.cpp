// freezekit._C.chains: at converted layers, the chains that enable makes at torch's operators.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "python/bindings.h"
#include "torch/enable/chain.h"

namespace freezekit {
namespace {

// function(input, ...), which is called as its caller would, so that all see the call.
py::object activation(const py::object& function, const py::object& input, const py::args& rest,
                      const py::kwargs& named) {
  const at::Tensor x = THPVariable_Unpack(input.ptr());
  const auto recipe = [&] {
    const py::gil_scoped_release no_gil;
    return enable::recipe_at_layer(x);
  }();
  if (!recipe) return function(input, *rest, **named);
  const py::object y = [&] {
    const chain::Unseen unseen;
    return function(input, *rest, **named);
  }();
  if (THPVariable_Check(y.ptr())) chain::keep(THPVariable_Unpack(y.ptr()), chain::Slot::self, x, recipe);
  return y;
}

void note_norm(const at::Tensor& result, const std::optional<at::Tensor>& bias, double eps) {
  enable::note_norm(result, bias.value_or(at::Tensor()), eps);
}

}  // namespace

void bind_chains(py::module_& parent) {
  py::module_ m = parent.def_submodule("chains", "What enable does at torch's operators, at converted layers.");
  m.def("activation", activation, "function(input, ...); behind a norm its node does not keep the input.");
  m.def("is_for_recipe", chain::is_for_recipe, "Whether a hook on saved tensors is given what a recipe reads.");
  m.def("is_let_go", chain::is_let_go, "Whether a hook on saved tensors is given what a node keeps no more.");
  m.def("note_norm", note_norm, "Is told of a norm's result, which an activation may read.");
  m.def("set_least_bytes", chain::set_least_bytes, "For tests: from how many bytes on an operand is made again.");
}

}  // namespace freezekit
