// freezekit._C.blocks.run: the call of a fused block, decided and made without Python.
//
// Whether a block may run as one operator depends on some thirty attributes of three layers and on the input. Asked in
// Python (freezekit/fusion/block.py) that is more work than a small convolution, so it is asked here first, at every call:
// nothing is remembered. What is not plainly fine gets None, and Python decides.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

#include "python/bindings.h"
#include "torch/common/layout.h"
#include "torch/common/operators.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"
#include "torch/frozen_conv2d/node.h"

namespace freezekit {
namespace {

using at::Tensor;

// Interned once, for lookups by identity.
struct Name {
  Name(const char* text) : object(PyUnicode_InternFromString(text)) {}  // NOLINT: a string literal is a name
  PyObject* object;
};

struct Names {
  Name stride{"stride"}, padding{"padding"}, dilation{"dilation"}, groups{"groups"}, padding_mode{"padding_mode"};
  Name weight{"weight"}, bias{"bias"}, running_mean{"running_mean"}, running_var{"running_var"}, eps{"eps"};
  Name training{"training"}, _parameters{"_parameters"}, _buffers{"_buffers"};
  std::array<Name, 4> hooks{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
};
const Names& names() {
  static const auto& interned = *new Names();
  return interned;
}

// Known classes: convolutions; norms, and whether they normalise with fixed statistics even while training; activations
// and the operator's names for them. Names that a layer must not have of its own. Methods of classes, and functions as
// (owner, name, function), that must still be what they were. Never destroyed: Python is gone by then.
struct Kinds {
  PyObject *convs = nullptr, *norms = nullptr, *activations = nullptr, *own = nullptr, *methods = nullptr;
  PyObject* functions = nullptr;
};
Kinds& kinds() {
  static auto& known = *new Kinds();
  return known;
}

void know(const py::object& convs, const py::dict& norms, const py::dict& activations, const py::tuple& own,
          const py::dict& methods, const py::tuple& functions) {
  const auto keep = [](py::object object) { return object.release().ptr(); };
  kinds() = {keep(convs), keep(norms), keep(activations), keep(own), keep(methods), keep(functions)};
}

// Borrowed; null where it is absent.
PyObject* get(PyObject* dict, const Name& name) {
  return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name.object) : nullptr;
}

PyObject* type_of(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)); }

// Whether an attribute of a class or a Python module is this object.
bool is_still(PyObject* owner, PyObject* name, PyObject* object) {
  const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(owner, name));
  if (!now) throw py::error_already_set();
  return now.ptr() == object;
}

// Whether somebody has replaced a function that layers and forwards call.
bool any_replaced() {
  PyObject* const functions = kinds().functions;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(functions); ++i) {
    PyObject* const each = PyTuple_GET_ITEM(functions, i);
    if (!is_still(PyTuple_GET_ITEM(each, 0), PyTuple_GET_ITEM(each, 1), PyTuple_GET_ITEM(each, 2))) return true;
  }
  return false;
}

// Whether somebody has put other methods into a class.
bool is_patched(PyObject* type) {
  PyObject* const methods = PyDict_GetItemWithError(kinds().methods, type);
  if (!methods) return true;
  PyObject *name = nullptr, *method = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(methods, &position, &name, &method)) {
    if (!is_still(type, name, method)) return true;
  }
  return false;
}

// Whether a transform stands before a tensor, which knows no operator that hands its input on.
bool is_wrapped(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet transforms(
      {DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize});
  return tensor.defined() && tensor.key_set().has_any(transforms);
}

// A layer's attributes: what its dictionary holds, borrowed.
class Layer {
 public:
  explicit Layer(PyObject* module)
      : type_(type_of(module)), dict_(py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr))) {
    if (!dict_) throw py::error_already_set();
  }

  PyObject* attribute(const Name& name) const { return get(dict_.ptr(), name); }

  // Whether calling it does no more than its class's forward says.
  bool is_unwatched() const {
    if (is_patched(type_)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds().own); ++i) {
      if (PyDict_GetItemWithError(dict_.ptr(), PyTuple_GET_ITEM(kinds().own, i))) return false;
    }
    for (const Name& name : names().hooks) {
      PyObject* const hooks = attribute(name);
      if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) != 0) return false;
    }
    return true;
  }

  // A parameter or a buffer, dense and without a transform; undefined for None. False where it is neither.
  bool tensor(const Name& name, Tensor* result) const {
    PyObject* found = get(attribute(names()._parameters), name);
    if (!found) found = get(attribute(names()._buffers), name);
    if (found == Py_None) return true;
    if (!found || !THPVariable_CheckExact(found)) return false;
    *result = THPVariable_Unpack(found);
    return result->layout() == at::kStrided && !is_wrapped(*result);
  }

 private:
  PyObject* type_;
  py::object dict_;
};

bool pair_of(PyObject* value, Geometry::Pair* result) {
  if (!value || !PyTuple_CheckExact(value) || PyTuple_GET_SIZE(value) != 2) return false;
  for (Py_ssize_t i = 0; i < 2; ++i) {
    PyObject* const item = PyTuple_GET_ITEM(value, i);
    if (!PyLong_CheckExact(item)) return false;
    const int64_t number = PyLong_AsLongLong(item);
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    (*result)[i] = number;
  }
  return true;
}

bool any_global_hook() {
  static PyObject* const ask =
      py::object(py::module_::import("torch.nn.modules.module").attr("_has_any_global_hook")).release().ptr();
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(ask));
  if (!answer) throw py::error_already_set();
  return PyObject_IsTrue(answer.ptr()) != 0;
}

// The dtype in which autocast computes on this device; none where it is off.
std::optional<at::ScalarType> autocast_dtype(c10::DeviceType device) {
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

bool read_conv(PyObject* module, FrozenOperands* o, Geometry* g) {
  const Names& of = names();
  if (PySet_Contains(kinds().convs, type_of(module)) != 1) return false;
  const Layer layer(module);
  PyObject *const grouping = layer.attribute(of.groups), *const padded = layer.attribute(of.padding_mode);
  if (!grouping || !PyLong_CheckExact(grouping) || !padded || !PyUnicode_CheckExact(padded)) return false;
  if (PyUnicode_CompareWithASCIIString(padded, "zeros") != 0) return false;
  g->groups = c10::SymInt(PyLong_AsLongLong(grouping));
  return pair_of(layer.attribute(of.stride), &g->stride) && pair_of(layer.attribute(of.padding), &g->padding) &&
         pair_of(layer.attribute(of.dilation), &g->dilation) && layer.is_unwatched() &&
         layer.tensor(of.weight, &o->weight) && o->weight.defined() && o->weight.dim() == 4 &&
         layer.tensor(of.bias, &o->bias);
}

// `always_fixed`: whether its class normalises with fixed statistics even while training.
bool read_norm(PyObject* module, FixedNormTensors* norm, bool* always_fixed) {
  const Names& of = names();
  if (module == Py_None) return true;
  PyObject* const fixed = PyDict_GetItemWithError(kinds().norms, type_of(module));
  if (!fixed) return false;
  const Layer layer(module);
  PyObject *const trains = layer.attribute(of.training), *const small = layer.attribute(of.eps);
  if ((fixed != Py_True && trains != Py_False) || !small || !PyFloat_CheckExact(small)) return false;
  norm->eps = PyFloat_AS_DOUBLE(small), *always_fixed = fixed == Py_True;
  return (norm->eps > 0 || (norm->eps == 0 && *always_fixed)) && layer.is_unwatched() &&
         layer.tensor(of.weight, &norm->gamma) && layer.tensor(of.bias, &norm->beta) &&
         layer.tensor(of.running_mean, &norm->mean) && layer.tensor(of.running_var, &norm->var) &&
         norm->mean.defined() && norm->var.defined();
}

// The operator's name for an activation: a module, a function's name, or None; null if it is another one.
const char* read_activation(PyObject* activation) {
  if (activation == Py_None) return "none";
  if (PyUnicode_CheckExact(activation)) return PyUnicode_AsUTF8(activation);
  PyObject* const kind = PyDict_GetItemWithError(kinds().activations, type_of(activation));
  return kind && Layer(activation).is_unwatched() ? PyUnicode_AsUTF8(kind) : nullptr;
}

// Whether a norm takes values of this dtype and gives them back in it. Torch's batch norm takes 16 bits beside parameters
// of float32; norms that are always fixed multiply and add, where the wider dtype wins.
bool keeps_dtype(const FixedNormTensors& norm, bool always_fixed, at::ScalarType dtype) {
  if (!norm.defined()) return true;
  const at::ScalarType own = norm.var.scalar_type();
  for (const Tensor* tensor : {&norm.gamma, &norm.beta, &norm.mean}) {
    if (tensor->defined() && tensor->scalar_type() != own) return false;
  }
  return own == dtype || (!always_fixed && own == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf));
}

// Sizes and dtypes that the operator takes; where they are wrong the layers themselves say so. And layouts of which it
// makes what they make.
bool fits(const FrozenOperands& o, const FrozenConv2d& f, bool always_fixed) {
  const Geometry& g = f.geometry;
  const Tensor &x = o.input, &w = o.weight, &b = o.bias;
  if (x.dim() != 4 || x.layout() != at::kStrided || !at::isFloatingType(x.scalar_type())) return false;
  if (b.defined() && b.scalar_type() != w.scalar_type()) return false;
  const FixedNormTensors& n = o.norm;
  if (w.requires_grad()) return false;
  for (const Tensor* vector : {&b, &n.gamma, &n.beta, &n.mean, &n.var}) {
    if (learns(*vector)) return false;
    if (vector->defined() && (vector->dim() != 1 || vector->size(0) != w.size(0))) return false;
    if (vector->defined() && vector->device() != x.device()) return false;
  }
  if (x.device() != w.device()) return false;
  const int64_t groups = g.groups.expect_int();
  if (groups < 1 || w.size(0) % groups != 0 || x.size(1) != w.size(1) * groups) return false;
  const auto stride = ints(g.stride), padding = ints(g.padding), dilation = ints(g.dilation);
  std::array<int64_t, 4> output = {x.size(0), w.size(0), 0, 0};
  for (size_t i = 0; i < 2; ++i) {
    if (stride[i] < 1 || dilation[i] < 1 || padding[i] < 0) return false;
    const int64_t room = x.size(2 + i) + 2 * padding[i] - dilation[i] * (w.size(2 + i) - 1) - 1;
    if (room < 0) return false;
    output[2 + i] = room / stride[i] + 1;
  }
  const auto autocast = autocast_dtype(x.device().type());
  const at::ScalarType dtype = autocast.value_or(x.scalar_type());
  if (autocast && (x.scalar_type() == at::kDouble || w.scalar_type() == at::kDouble)) return false;
  if (!autocast && x.scalar_type() != w.scalar_type()) return false;
  if (!keeps_dtype(o.norm, always_fixed, dtype)) return false;
  const Tensor& r = o.residual;
  const bool adds = !r.defined() || (r.scalar_type() == dtype && r.device() == x.device() &&
                                     r.layout() == at::kStrided && r.sizes() == at::IntArrayRef(output));
  return adds && is_laid_out_as_by_layers(o, f, c10::fromIntArrayRefSlow(output));
}

// run(x, conv, norm, activation, residual, backend, shared): y, or (y, x) if shared; or None. It is called
// for every block, and so takes its arguments without pybind11.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "run takes 7 arguments, got ", count);
  PyObject *const x = args[0], *const residual = args[4];
  if (!THPVariable_CheckExact(x) || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  if (residual != Py_None && !THPVariable_CheckExact(residual)) Py_RETURN_NONE;
  FrozenOperands o;
  Geometry g({1}, {0}, {1}, 1, py::handle(args[5]).cast<std::string>());
  o.input = THPVariable_Unpack(x);
  if (residual != Py_None) o.residual = THPVariable_Unpack(residual);
  bool always_fixed = false;
  if (!read_conv(args[1], &o, &g)) Py_RETURN_NONE;
  if (o.weight.requires_grad() && !autocast_dtype(o.input.device().type())) will_be_kept(o.input);
  if (!read_norm(args[2], &o.norm, &always_fixed)) Py_RETURN_NONE;
  const char* const activation = read_activation(args[3]);
  if (!activation) Py_RETURN_NONE;
  const FrozenConv2d f(activation, std::move(g));
  if (!fits(o, f, always_fixed) || any_global_hook() || any_replaced()) Py_RETURN_NONE;
  const bool shared = args[6] == Py_True;
  std::tuple<Tensor, Tensor> result;
  {
    const pybind11::gil_scoped_release no_gil;
    if (shared && !is_wrapped(o.input) && !is_wrapped(o.residual)) {
      result = frozen_conv2d_shared(o, f);
    } else {
      result = {std::get<0>(frozen_conv2d(o, f, /*keep_mask=*/false)), o.input};
    }
  }
  if (!shared) return THPVariable_Wrap(std::get<0>(std::move(result)));
  const auto y = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<0>(std::move(result))));
  const auto passed = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<1>(std::move(result))));
  return py::make_tuple(y, passed).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef run_method = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
                          "The call of a block whose layers and operands are plainly fit; else None."};

}  // namespace

void bind_blocks(py::module_& parent) {
  py::module_ m = parent.def_submodule("blocks", "Calls of fused blocks.");
  m.attr("run") = py::reinterpret_steal<py::object>(PyCFunction_New(&run_method, nullptr));
  m.def("know", &know, py::arg("convs"), py::arg("norms"), py::arg("activations"), py::arg("own"), py::arg("methods"),
        py::arg("functions"), "The classes that blocks are made of, and what they call.");
}

}  // namespace freezekit
