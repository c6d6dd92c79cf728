// freezekit._C.blocks: calls of fused blocks that are like one before, and the fold that they compute with.
//
// Whether a block may run as one operator is decided in Python (freezekit/fuse/block.py), by some thirty attributes of
// three layers and by the input: more work than a small convolution. A memo holds what such a decision saw: layers'
// types, attributes and hooks, the state of each tensor, sizes and dtypes of what goes in. While all that is as it was,
// so is the decision, and the operator is called at once. Memos hold nothing alive that could hold a model alive.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <list>
#include <unordered_map>

#include "python/bindings.h"
#include "torch/frozen_conv2d/fold.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"
#include "torch/common/layout.h"
#include "torch/common/snapshot.h"

namespace freezekit {
namespace {

using at::Tensor;

struct Name {
  Name(const char* text) : object(PyUnicode_InternFromString(text)) {}  // NOLINT: a string literal is a name
  PyObject* object;
};

// A frozen tensor of a layer, or that it has none. Another tensor may take its address once it is gone; one that lies in
// the same storage with the same version is as good. A weak pointer would stand in the way of torch.utils.swap_tensors.
class Source {
 public:
  explicit Source(PyObject* object) {
    if (object == Py_None) return;
    const Tensor& tensor = THPVariable_Unpack(object);
    impl_ = tensor.unsafeGetTensorImpl();
    snapshot_.emplace(tensor);
  }

  bool matches(PyObject* object) const {
    if (!impl_) return object == Py_None;
    if (!object || !THPVariable_Check(object)) return false;
    const Tensor& tensor = THPVariable_Unpack(object);
    return impl_ == tensor.unsafeGetTensorImpl() && !tensor.requires_grad() && snapshot_->matches(tensor);
  }

 private:
  const c10::TensorImpl* impl_ = nullptr;
  std::optional<Snapshot> snapshot_;
};

// Several of them, for Python.
class Stamp {
 public:
  explicit Stamp(const py::list& tensors) {
    for (const py::handle tensor : tensors) sources_.emplace_back(tensor.ptr());
  }
  bool matches(const py::list& tensors) const {
    if (tensors.size() != sources_.size()) return false;
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (!sources_[i].matches(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)))) return false;
    }
    return true;
  }

 private:
  std::vector<Source> sources_;
};

struct Parts {
  std::vector<Name> attributes, parameters, buffers;
};

const Parts& conv_parts() {
  static const auto& parts = *new Parts{{"stride", "padding", "dilation", "groups", "padding_mode", "kernel_size",
                                         "in_channels", "out_channels"},
                                        {"weight", "bias"},
                                        {}};
  return parts;
}
const Parts& norm_parts() {
  static const auto& parts =
      *new Parts{{"training", "eps", "affine"}, {"weight", "bias"}, {"running_mean", "running_var"}};
  return parts;
}
const Parts& no_parts() {
  static const auto& parts = *new Parts();
  return parts;
}

// Borrowed; null where it is absent.
PyObject* get(PyObject* dict, const Name& name) {
  return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name.object) : nullptr;
}

bool is_constant(PyObject* value) {
  return PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) || PyUnicode_CheckExact(value) ||
         PyTuple_CheckExact(value);
}

bool has_hooks(PyObject* dict) {
  static const auto& names = *new std::array<Name, 4>{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                                      "_backward_pre_hooks"};
  static const auto& forward = *new Name("forward");
  if (get(dict, forward)) return true;
  for (const Name& name : names) {
    PyObject* const hooks = get(dict, name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) != 0) return true;
  }
  return false;
}

// A layer as it was seen.
class Layer {
 public:
  // None where something about it may change unseen.
  static std::optional<Layer> seen(PyObject* module, const Parts& parts) {
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) throw py::error_already_set();
    Layer layer(parts);
    layer.type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(module)));
    for (const Name& name : parts.attributes) {
      PyObject* const value = get(dict.ptr(), name);
      if (!value || !is_constant(value)) return std::nullopt;
      layer.values_.push_back(py::reinterpret_borrow<py::object>(value));
    }
    const bool complete = layer.each_tensor(dict.ptr(), [&](PyObject* object, size_t) {
      if (!object || (object != Py_None && !THPVariable_Check(object))) return false;
      layer.sources_.emplace_back(object);
      return true;
    });
    return complete && layer.matches(module) ? std::make_optional(std::move(layer)) : std::nullopt;
  }

  bool matches(PyObject* module) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != type_.ptr()) return false;
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict || has_hooks(dict.ptr())) return false;
    for (size_t i = 0; i < values_.size(); ++i) {
      if (get(dict.ptr(), parts_->attributes[i]) != values_[i].ptr()) return false;
    }
    return each_tensor(dict.ptr(), [&](PyObject* object, size_t i) { return object && sources_[i].matches(object); });
  }

 private:
  explicit Layer(const Parts& parts) : parts_(&parts) {}

  template <class F>
  bool each_tensor(PyObject* dict, const F& f) const {
    static const auto& parameters = *new Name("_parameters");
    static const auto& buffers = *new Name("_buffers");
    size_t i = 0;
    for (const Name& name : parts_->parameters) {
      if (!f(get(get(dict, parameters), name), i++)) return false;
    }
    for (const Name& name : parts_->buffers) {
      if (!f(get(get(dict, buffers), name), i++)) return false;
    }
    return true;
  }

  const Parts* parts_;
  py::object type_;
  std::vector<py::object> values_;
  std::vector<Source> sources_;
};

// What an operand is but for its values; none where there is none.
class Operand {
 public:
  explicit Operand(PyObject* object) {
    if (object == Py_None) return;
    const Tensor& tensor = THPVariable_Unpack(object);
    type_ = Py_TYPE(object);
    size_.assign(tensor.sizes().begin(), tensor.sizes().end());
    options_ = tensor.options();
    keys_ = keys_of(tensor);
  }

  bool matches(PyObject* object) const {
    if (!type_) return object == Py_None;
    if (Py_TYPE(object) != type_) return false;
    const Tensor& tensor = THPVariable_Unpack(object);
    return keys_ == keys_of(tensor) && tensor.sizes() == at::IntArrayRef(size_) &&
           tensor.scalar_type() == options_.dtype().toScalarType() && tensor.device() == options_.device();
  }

 private:
  // Apart from what tells whether a gradient is needed: layout, and wrappers of transforms.
  static c10::DispatchKeySet keys_of(const Tensor& tensor) {
    return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  }

  PyTypeObject* type_ = nullptr;  // torch's own two, which live as long as the process
  c10::SmallVector<int64_t, 4> size_;
  at::TensorOptions options_;
  c10::DispatchKeySet keys_;
};

// The dtype that autocast computes in on this device; none where it is off.
std::optional<at::ScalarType> autocast_dtype(c10::DeviceType device) {
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

bool any_global_hook() {
  static PyObject* const ask =
      py::object(py::module_::import("torch.nn.modules.module").attr("_has_any_global_hook")).release().ptr();
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(ask));
  if (!answer) throw py::error_already_set();
  return PyObject_IsTrue(answer.ptr()) != 0;
}

// The arguments of a block, borrowed.
struct Call {
  PyObject *x, *conv, *norm, *activation, *residual, *backend;
};

struct Memo {
  Layer conv;
  std::optional<Layer> norm, activation;
  py::object function;  // the activation, where it is no module
  Operand x, residual;
  std::optional<at::ScalarType> autocast;
  py::object backend;
  // What is to be called.
  FrozenConv2d f;
  Tensor weight;
  std::optional<Tensor> bias;
  bool source_is_channels_last;  // the convolution's own weight: torch's rule for the layout of a result reads it

  bool is_for(const Call& call) const {
    return x.matches(call.x) && residual.matches(call.residual) && norm.has_value() == (call.norm != Py_None) &&
           (activation || PyObject_RichCompareBool(function.ptr(), call.activation, Py_EQ) == 1) &&
           PyObject_RichCompareBool(backend.ptr(), call.backend, Py_EQ) == 1 &&
           autocast == autocast_dtype(THPVariable_Unpack(call.x).device().type());
  }
  bool holds(const Call& call) const {
    return conv.matches(call.conv) && (!norm || norm->matches(call.norm)) &&
           (!activation || activation->matches(call.activation)) && !any_global_hook();
  }
};

// By convolution, last used first; guarded by the GIL. Never destroyed: Python is gone by then.
constexpr size_t kMemosPerConv = 8;
std::unordered_map<PyObject*, std::list<Memo>>& memos() {
  static auto& all = *new std::unordered_map<PyObject*, std::list<Memo>>();
  return all;
}

const Memo* find(const Call& call) {
  const auto found = memos().find(call.conv);
  if (found == memos().end()) return nullptr;
  auto& known = found->second;
  for (auto memo = known.begin(); memo != known.end(); ++memo) {
    if (!memo->is_for(call)) continue;
    if (!memo->holds(call)) {
      known.erase(memo);
      return nullptr;
    }
    known.splice(known.begin(), known, memo);
    return &known.front();
  }
  return nullptr;
}

bool is_channels_last(const Tensor& a, const Tensor& b) { return layout_of(a, b) == at::MemoryFormat::ChannelsLast; }

// run(x, conv, norm, activation, residual, channels_last, backend, shared): y, or (y, x) if shared; None where no memo
// answers. It is called for every block, and so takes its arguments without pybind11.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "run takes 8 arguments, got ", count);
  if (!THPVariable_Check(args[0]) || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  const Memo* const memo = find({args[0], args[1], args[2], args[3], args[4], args[6]});
  if (!memo) Py_RETURN_NONE;
  FrozenConv2d f = memo->f;
  const Tensor x = THPVariable_Unpack(args[0]), weight = memo->weight;
  const std::optional<Tensor> bias = memo->bias;
  const std::optional<Tensor> residual =
      args[4] == Py_None ? std::nullopt : std::make_optional(THPVariable_Unpack(args[4]));
  f.channels_last = args[5] == Py_None
                        ? memo->source_is_channels_last || x.suggest_memory_format() == at::MemoryFormat::ChannelsLast
                        : args[5] == Py_True;
  const bool shared = args[7] == Py_True;
  std::tuple<Tensor, Tensor> result;
  {
    const pybind11::gil_scoped_release no_gil;
    result = shared ? frozen_conv2d_shared(x, weight, bias, residual, f)
                    : frozen_conv2d(x, weight, bias, residual, f, /*keep_mask=*/false);
  }
  if (!shared) return THPVariable_Wrap(std::get<0>(std::move(result)));
  const auto y = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<0>(std::move(result))));
  const auto passed = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<1>(std::move(result))));
  return py::make_tuple(y, passed).release().ptr();
  END_HANDLE_TH_ERRORS
}

std::vector<int64_t> numbers(const py::object& value) {
  return PyLong_Check(value.ptr()) ? std::vector<int64_t>{value.cast<int64_t>()} : value.cast<std::vector<int64_t>>();
}

// After a block was found to run as one operator: whether this is the first memo of its convolution.
bool remember(const py::object& x, const py::object& conv, const py::object& norm, const py::object& activation,
              const py::object& residual, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::string& kind, const std::string& backend) {
  const bool is_module = !activation.is_none() && !py::isinstance<py::str>(activation);
  auto of_conv = Layer::seen(conv.ptr(), conv_parts());
  auto of_norm = norm.is_none() ? std::nullopt : Layer::seen(norm.ptr(), norm_parts());
  auto of_activation = is_module ? Layer::seen(activation.ptr(), no_parts()) : std::nullopt;
  if (!of_conv || (!norm.is_none() && !of_norm) || (is_module && !of_activation)) return false;
  const auto stride = numbers(conv.attr("stride")), padding = numbers(conv.attr("padding"));
  const auto dilation = numbers(conv.attr("dilation"));
  const Geometry g(c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
                   c10::fromIntArrayRefSlow(dilation), conv.attr("groups").cast<int64_t>(), backend);
  const Tensor source = conv.attr("weight").cast<Tensor>();
  auto& known = memos()[conv.ptr()];
  const bool first = known.empty();
  if (known.size() == kMemosPerConv) known.pop_back();
  known.push_front({std::move(*of_conv), std::move(of_norm), std::move(of_activation),
                    is_module ? py::object() : activation, Operand(x.ptr()), Operand(residual.ptr()),
                    autocast_dtype(THPVariable_Unpack(x.ptr()).device().type()), py::str(backend),
                    FrozenConv2d(kind, std::nullopt, g), weight, bias,
                    source.suggest_memory_format() == at::MemoryFormat::ChannelsLast});
  return first;
}

PyMethodDef run_method = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
                          "The call as it was decided before; None where it was not."};

}  // namespace

void bind_blocks(py::module_& parent) {
  py::module_ m = parent.def_submodule("blocks", "Calls of fused blocks that are like one before.");
  m.attr("run") = py::reinterpret_steal<py::object>(PyCFunction_New(&run_method, nullptr));
  m.def("remember", &remember);
  m.def("forget", [](size_t id) { memos().erase(reinterpret_cast<PyObject*>(id)); });
  m.def("is_channels_last", &is_channels_last, "torch's rule for the layout of a convolution's result.");
  m.def("fold", [](const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var,
                   const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps,
                   const std::string& backend) {
    return fold_batch_norm(weight, bias, {mean, var, gamma, beta, eps}, parse_backend(backend));
  });
  py::class_<Stamp>(m, "Stamp").def(py::init<const py::list&>()).def("matches", &Stamp::matches);
}

}  // namespace freezekit
