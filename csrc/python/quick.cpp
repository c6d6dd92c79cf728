// freezekit._C.quick: operators as layers call them, on a shorter way than through torch.ops.
//
// torch.ops finds an operator's schema, boxes every argument and unboxes the result; beside a small layer that is a good
// part of the time. Only the plainest call goes this way: whatever is unusual about an argument is left to Python, which
// knows what to say of it. The operator is the same, and so is all that the dispatcher does with it.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "python/bindings.h"
#include "torch/common/operators.h"

namespace freezekit {
namespace {

bool read(PyObject* object, int64_t* value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read(PyObject* object, std::array<int64_t, 2>* pair) {
  if (PyTuple_CheckExact(object)) {
    return PyTuple_GET_SIZE(object) == 2 && read(PyTuple_GET_ITEM(object, 0), &(*pair)[0]) &&
           read(PyTuple_GET_ITEM(object, 1), &(*pair)[1]);
  }
  return read(object, &(*pair)[0]) && read(object, &(*pair)[1]);
}

bool is_image_batch(PyObject* object) {
  return THPVariable_CheckExact(object) && THPVariable_Unpack(object).dim() == 4;
}

// conv2d(input, weight, bias, stride, padding, dilation, groups, backend): y, or None where this way does not serve.
PyObject* quick_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "conv2d takes 8 arguments, got ", count);
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  const bool has_bias = args[2] != Py_None;
  if (!is_image_batch(args[0]) || !THPVariable_CheckExact(args[1]) || (has_bias && !THPVariable_CheckExact(args[2])) ||
      !read(args[3], &stride) || !read(args[4], &padding) || !read(args[5], &dilation) || !read(args[6], &groups) ||
      at::impl::torch_function_mode_enabled()) {
    Py_RETURN_NONE;
  }
  const char* const backend = PyUnicode_AsUTF8(args[7]);
  if (!backend) throw python_error();
  const Tensor input = THPVariable_Unpack(args[0]), weight = THPVariable_Unpack(args[1]);
  const std::optional<Tensor> bias = has_bias ? std::make_optional(THPVariable_Unpack(args[2])) : std::nullopt;
  const Geometry geometry(c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
                          c10::fromIntArrayRefSlow(dilation), groups, backend);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = conv2d(input, weight, bias, geometry);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// activation(input, kind, a, b, inplace, backend): y, or None where this way does not serve.
PyObject* quick_activation(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "activation takes 6 arguments, got ", count);
  if (!THPVariable_CheckExact(args[0]) || !PyFloat_CheckExact(args[2]) || !PyFloat_CheckExact(args[3]) ||
      !PyBool_Check(args[4]) || at::impl::torch_function_mode_enabled()) {
    Py_RETURN_NONE;
  }
  const char* const kind = PyUnicode_AsUTF8(args[1]);
  const char* const backend = kind ? PyUnicode_AsUTF8(args[5]) : nullptr;
  if (!backend) throw python_error();
  const double a = PyFloat_AS_DOUBLE(args[2]), b = PyFloat_AS_DOUBLE(args[3]);
  Tensor x = THPVariable_Unpack(args[0]), y;
  if (args[4] == Py_True) {
    static const auto op =
        find<void(Tensor&, std::string_view, double, double, std::string_view)>("freezekit::activation_");
    const pybind11::gil_scoped_release no_gil;
    op.call(x, kind, a, b, backend);
  } else {
    static const auto op =
        find<Tensor(const Tensor&, std::string_view, double, double, std::string_view)>("freezekit::activation");
    const pybind11::gil_scoped_release no_gil;
    y = op.call(x, kind, a, b, backend);
  }
  return y.defined() ? THPVariable_Wrap(std::move(y)) : Py_NewRef(args[0]);
  END_HANDLE_TH_ERRORS
}

bool read(PyObject* object, std::optional<Tensor>* tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  *tensor = THPVariable_Unpack(object);
  return true;
}

// batch_norm(input, weight, bias, mean, var, eps): y, or None where this way does not serve.
PyObject* quick_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "batch_norm takes 6 arguments, got ", count);
  std::optional<Tensor> weight, bias;
  if (!THPVariable_CheckExact(args[0]) || !read(args[1], &weight) || !read(args[2], &bias) ||
      !THPVariable_CheckExact(args[3]) || !THPVariable_CheckExact(args[4]) || !PyFloat_CheckExact(args[5]) ||
      at::impl::torch_function_mode_enabled()) {
    Py_RETURN_NONE;
  }
  static const auto op = find<Tensor(const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                                     const Tensor&, const Tensor&, double)>("freezekit::batch_norm");
  const Tensor x = THPVariable_Unpack(args[0]), mean = THPVariable_Unpack(args[3]), var = THPVariable_Unpack(args[4]);
  const double eps = PyFloat_AS_DOUBLE(args[5]);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = op.call(x, weight, bias, mean, var, eps);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kRun)(PyObject*, PyObject* const*, Py_ssize_t)>
py::object function(const char* name, const char* doc) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kRun)), METH_FASTCALL,
                               doc};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace

void bind_quick(py::module_& parent) {
  py::module_ m = parent.def_submodule("quick", "Operators on a shorter way than through torch.ops.");
  m.attr("activation") = function<quick_activation>("activation", "The activation of a plain tensor; None of others.");
  m.attr("batch_norm") = function<quick_batch_norm>("batch_norm", "batch_norm of plain tensors; None of others.");
  m.attr("conv2d") = function<quick_conv2d>("conv2d", "conv2d of plain arguments; None of others.");
}

}  // namespace freezekit
