// freezekit._C.quick: layers' functions as Python calls them, on a shorter way than through torch.ops.
//
// torch.ops finds an operator's schema, boxes every argument and unboxes the result; beside a small layer that is a good
// part of the time. Only the plainest call goes this way: whatever is unusual about an argument is left to Python, which
// knows what to say of it. Functions take what those of freezekit.functional take, in that order and without names.
#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/adaptive_avg_pool3d.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>

#include "python/bindings.h"
#include "torch/bits/layers.h"
#include "torch/common/operators.h"
#include "torch/common/unseen.h"
#include "torch/conv2d/autograd.h"
#include "torch/conv_nd/conv_nd.h"
#include "torch/enable/chain.h"
#include "torch/linear_layers/linear_layers.h"
#include "torch/max_pool2d/max_pool2d.h"
#include "torch/max_pool3d/max_pool3d.h"
#include "torch/norm/norm.h"

namespace freezekit {
namespace {

std::atomic<Backend> backend = Backend::automatic;

// A call's arguments, of which the last may be missing.
struct Given {
  PyObject* const* arguments;
  Py_ssize_t count;

  PyObject* operator[](Py_ssize_t i) const { return i < count ? arguments[i] : nullptr; }
};

// Each reads a plain argument; false where it is another. One that is missing leaves the value as it is.
bool read(PyObject* object, bool* value) {
  if (object) *value = object == Py_True;
  return !object || PyBool_Check(object);
}

bool read(PyObject* object, double* value) {
  if (!object) return true;
  if (!PyFloat_CheckExact(object)) return false;
  *value = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, int64_t* value) {
  if (!object) return true;
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// One number for all axes, or one for each.
template <size_t kAxes>
bool read(PyObject* object, std::array<int64_t, kAxes>* numbers) {
  const bool is_tuple = object && PyTuple_CheckExact(object);
  if (is_tuple && PyTuple_GET_SIZE(object) != kAxes) return false;
  for (size_t i = 0; i < kAxes; ++i) {
    if (!read(is_tuple ? PyTuple_GET_ITEM(object, i) : object, &(*numbers)[i])) return false;
  }
  return true;
}

bool read(PyObject* object, c10::SmallVector<int64_t, 4>* numbers) {
  if (!object || !PyTuple_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    if (!read(PyTuple_GET_ITEM(object, i), &numbers->emplace_back())) return false;
  }
  return true;
}

bool read(PyObject* object, Tensor* tensor) {
  if (!object || !THPVariable_CheckExact(object)) return false;
  *tensor = THPVariable_Unpack(object);
  return true;
}

bool read(PyObject* object, OptionalTensor* tensor) {
  if (!object || object == Py_None) return true;
  return read(object, &tensor->emplace());
}

bool is_text(PyObject* object, const char* text) {
  return object && PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

// The arguments from `first` on, one after another.
template <class... Values>
bool read_all(const Given& given, Py_ssize_t first, Values*... values) {
  return (read(given[first++], values) && ...);
}

// A function's result for a plain call; undefined where this way does not serve.
using Function = Tensor (*)(const Given&);

template <Function kFunction, Py_ssize_t kMost>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  // A function mode is to see the function that was called, and a trace to record torch's. What a demand for kernels
  // means is said by Python. Below autograd nothing is recorded, whatever the grad mode.
  if (count > kMost || is_own(backend) || is_below_autograd() || at::impl::torch_function_mode_enabled() ||
      torch::jit::tracer::isTracing()) {
    Py_RETURN_NONE;
  }
  Tensor result = kFunction({arguments, count});
  if (!result.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(result));
  END_HANDLE_TH_ERRORS
}

// pybind11's guard looks its own state up first, which takes longer than this does.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

template <class Compute>
Tensor without_gil(const Compute& compute) {
  const WithoutGil without;
  return compute();
}

c10::SymIntArrayRef symbols(at::IntArrayRef numbers) { return c10::fromIntArrayRefSlow(numbers); }

Tensor quick_conv2d(const Given& given) {
  Tensor input, weight;
  OptionalTensor bias;
  std::array<int64_t, 2> stride = {1, 1}, padding = {0, 0}, dilation = {1, 1};
  int64_t groups = 1;
  if (!read_all(given, 0, &input, &weight, &bias, &stride, &padding, &dilation, &groups) || input.dim() != 4) return {};
  if (weight.dim() == 4 && weight.sym_size(1).maybe_as_int() == 0) return {};  // torch makes no channels of none
  return without_gil([&] {
    const Geometry geometry(stride, padding, dilation, groups, backend);
    return is_unseen(input, weight, bias ? *bias : weight) ? record_conv2d(input, weight, bias, geometry)
                                                           : conv2d(input, weight, bias, geometry);
  });
}

template <size_t kAxes, bool kTransposed>
Tensor quick_convolution(const Given& given) {
  Tensor input, weight;
  OptionalTensor bias;
  std::array<int64_t, kAxes> stride, padding = {}, dilation, output_padding = {};
  stride.fill(1), dilation.fill(1);
  int64_t groups = 1;
  const bool is_plain =
      read_all(given, 0, &input, &weight, &bias, &stride, &padding) &&
      (kTransposed ? read_all(given, 5, &output_padding, &groups, &dilation) : read_all(given, 5, &dilation, &groups));
  if (!is_plain || input.dim() != kAxes + 2 || weight.dim() != kAxes + 2 ||
      !is_unseen(input, weight, bias ? *bias : weight) || input.is_complex()) {
    return {};
  }
  return without_gil([&] {
    const ConvNdGeometry geometry(symbols(stride), symbols(padding), symbols(dilation), kTransposed,
                                  symbols(output_padding), groups);
    return record_convolution(input, weight, bias, geometry);
  });
}

Tensor activation(Tensor x, const PiecewiseActivation& f, bool inplace) {
  return without_gil([&]() -> Tensor {
    const Backend current = backend;
    if (!is_unseen(x)) {
      static const auto op = find_operator<Tensor(const Tensor&, std::string_view, double, double, std::string_view)>(
          "freezekit::activation");
      static const auto inplace_op =
          find_operator<void(Tensor&, std::string_view, double, double, std::string_view)>("freezekit::activation_");
      if (!inplace) return op.call(x, to_string(f.kind), f.a, f.b, to_string(current));
      inplace_op.call(x, to_string(f.kind), f.a, f.b, to_string(current));
      return x;
    }
    if (!inplace) return record_activation(x, f, current);
    record_activation_(x, f, current);
    return x;
  });
}

Tensor quick_relu(const Given& given) {
  Tensor x;
  bool inplace = false;
  if (!read_all(given, 0, &x, &inplace)) return {};
  return activation(std::move(x), {ActivationKind::relu}, inplace);
}

Tensor quick_hardtanh(const Given& given) {
  Tensor x;
  double lowest = -1, highest = 1;
  bool inplace = false;
  if (!read_all(given, 0, &x, &lowest, &highest, &inplace) || !(lowest <= highest)) return {};
  return activation(std::move(x), {ActivationKind::hardtanh, lowest, highest}, inplace);
}

Tensor quick_leaky_relu(const Given& given) {
  Tensor x;
  double slope = 0.01;
  bool inplace = false;
  if (!read_all(given, 0, &x, &slope, &inplace) || (inplace && !(slope >= 0))) return {};
  return activation(std::move(x), {ActivationKind::leaky_relu, slope}, inplace);
}

Tensor quick_prelu(const Given& given) {
  Tensor x, weight;
  if (!read_all(given, 0, &x, &weight)) return {};
  return without_gil([&] {
    if (is_unseen(x, weight)) return prelu(x, weight, backend);
    static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, std::string_view)>("freezekit::prelu");
    return op.call(x, weight, to_string(backend));
  });
}

// call(), an activation of x by torch's operator. Where a norm made x, its node keeps a recipe instead of x.
template <class Call>
Tensor behind_norm(const Tensor& x, const Call& call, bool inplace = false) {
  return without_gil([&]() -> Tensor {
    // In place of a view, the node is one of the view's base.
    const auto recipe = inplace && x.is_view() ? nullptr : enable::recipe_at_layer(x);
    if (!recipe) return call();
    const Tensor y = [&] {
      const chain::Unseen unseen;
      return call();
    }();
    chain::keep(y, chain::Slot::self, x, recipe);
    return y;
  });
}

template <Tensor (*kFunction)(const Tensor&), Tensor& (*kInPlace)(Tensor&)>
Tensor quick_smooth(const Given& given) {
  Tensor x;
  bool inplace = false;
  if (!read_all(given, 0, &x, &inplace)) return {};
  return behind_norm(x, [&]() -> Tensor { return inplace ? kInPlace(x) : kFunction(x); }, inplace);
}

Tensor quick_gelu(const Given& given) {
  Tensor x;
  const bool by_tanh = is_text(given[1], "tanh");
  if (!read(given[0], &x) || (given[1] && !by_tanh && !is_text(given[1], "none"))) return {};
  return behind_norm(x, [&] { return at::gelu(x, by_tanh ? "tanh" : "none"); });
}

Tensor quick_dropout(const Given& given) {
  Tensor x;
  double p = 0.5;
  bool train = true, inplace = false;
  if (!read_all(given, 0, &x, &p, &train, &inplace) || !(p >= 0 && p <= 1) || !is_unseen(x)) return {};
  return without_gil([&] {
    if (!inplace) return record_dropout(x, p, train, backend);
    record_dropout_(x, p, train, backend);
    return x;
  });
}

Tensor quick_batch_norm(const Given& given) {
  Tensor x, mean, var;
  OptionalTensor weight, bias;
  bool training = false;
  double momentum = 0.1, eps = 1e-5;
  if (!read_all(given, 0, &x, &mean, &var, &weight, &bias, &training, &momentum, &eps) || training || !(eps > 0)) {
    return {};
  }
  return without_gil([&] {
    if (is_unseen(x, weight ? *weight : x, bias ? *bias : x, mean, var)) {
      return record_batch_norm(x, weight, bias, mean, var, eps);
    }
    static const auto op = find_operator<decltype(record_batch_norm)>("freezekit::batch_norm");
    return op.call(x, weight, bias, mean, var, eps);
  });
}

// Layer and group norm are torch's, but where the bias alone learns and freezekit keeps less.
Tensor quick_layer_norm(const Given& given) {
  Tensor x;
  OptionalTensor weight, bias;
  double eps = 1e-5;
  c10::SmallVector<int64_t, 4> shape;
  if (!read_all(given, 0, &x, &shape, &weight, &bias, &eps)) return {};
  if (is_for_bias_alone(x, tensor_of(weight), tensor_of(bias))) return {};
  return without_gil([&] {
    const Tensor y = at::layer_norm(x, shape, weight, bias, eps, at::globalContext().userEnabledCuDNN());
    enable::note_norm(y, bias.value_or(Tensor()), eps);
    return y;
  });
}

Tensor quick_group_norm(const Given& given) {
  Tensor x;
  OptionalTensor weight, bias;
  int64_t groups = 0;
  double eps = 1e-5;
  if (!read_all(given, 0, &x, &groups, &weight, &bias, &eps)) return {};
  if (is_for_bias_alone(x, tensor_of(weight), tensor_of(bias))) return {};
  // Of one value per group torch says in Python that there is nothing to normalise.
  if (x.dim() < 2 || groups < 1 || x.numel() <= x.size(0) * groups) return {};
  return without_gil([&] {
    const Tensor y = at::group_norm(x, groups, weight, bias, eps, at::globalContext().userEnabledCuDNN());
    enable::note_norm(y, bias.value_or(Tensor()), eps);
    return y;
  });
}

// The settings of a pooling; without a stride the windows stand side by side.
template <size_t kAxes>
bool read_windows(const Given& given, std::array<int64_t, kAxes>* kernel_size, std::array<int64_t, kAxes>* stride,
                  std::array<int64_t, kAxes>* padding) {
  if (!given[1] || !read(given[1], kernel_size)) return false;
  *stride = *kernel_size;
  return (given[2] == Py_None || read(given[2], stride)) && read(given[3], padding);
}

template <size_t kAxes>
Tensor quick_max_pool(const Given& given) {
  Tensor x;
  std::array<int64_t, kAxes> kernel_size, stride, padding = {}, dilation;
  dilation.fill(1);
  bool ceil_mode = false, return_indices = false;
  if (!read(given[0], &x) || x.dim() != kAxes + 2 || !read_windows(given, &kernel_size, &stride, &padding) ||
      !read_all(given, 4, &dilation, &ceil_mode, &return_indices) || return_indices || !is_unseen(x)) {
    return {};
  }
  // Where nothing is recorded, torch has another kernel for rows on a CPU, whose results are always contiguous.
  if (kAxes == 1 && !(learns(x) && at::GradMode::is_enabled())) return {};
  const auto kernels = symbols(kernel_size), strides = symbols(stride), paddings = symbols(padding);
  return without_gil([&] {
    if constexpr (kAxes == 3) {
      return record_max_pool3d(x, Windows3d(kernels, strides, paddings, symbols(dilation), ceil_mode));
    } else if constexpr (kAxes == 2) {
      return record_max_pool2d(
          x, PoolGeometry(kernels, strides, paddings, symbols(dilation), ceil_mode, to_string(backend)));
    } else {
      return record_max_pool1d(
          x, PoolGeometry::of_rows(kernels, strides, paddings, symbols(dilation), ceil_mode, to_string(backend)));
    }
  });
}

// A row is an image of one line: f(x with an axis more), of which the axis goes again. Others are as they are.
template <size_t kAxes, class F>
Tensor of_image(const Tensor& x, const F& f) {
  return without_gil([&]() -> Tensor { return kAxes == 1 ? f(x.unsqueeze(-2)).squeeze(-2) : f(x); });
}
template <size_t kAxes>
auto for_image(const std::array<int64_t, kAxes>& numbers, int64_t of_line) {
  if constexpr (kAxes == 1) {
    return std::array{of_line, numbers[0]};
  } else {
    return numbers;
  }
}

template <size_t kAxes>
Tensor quick_avg_pool(const Given& given) {
  Tensor x;
  std::array<int64_t, kAxes> kernel_size, stride, padding = {};
  bool ceil_mode = false, count_include_pad = true;
  if (!read(given[0], &x) || (x.dim() != kAxes + 1 && x.dim() != kAxes + 2) ||
      !read_windows(given, &kernel_size, &stride, &padding) || !read_all(given, 4, &ceil_mode, &count_include_pad) ||
      (given[6] && given[6] != Py_None) || !is_unseen(x)) {
    return {};
  }
  return of_image<kAxes>(x, [&](const Tensor& image) {
    return record_avg_pool(image, for_image(kernel_size, 1), for_image(stride, 1), for_image(padding, 0), ceil_mode,
                           count_include_pad, std::nullopt);
  });
}

template <size_t kAxes>
Tensor quick_adaptive_avg_pool(const Given& given) {
  Tensor x;
  std::array<int64_t, kAxes> size;
  if (!given[1] || !read_all(given, 0, &x, &size) || (x.dim() != kAxes + 1 && x.dim() != kAxes + 2) || !is_unseen(x)) {
    return {};
  }
  const bool is_mean = std::ranges::all_of(size, [](int64_t places) { return places == 1; });
  return of_image<kAxes>(x, [&](const Tensor& image) {
    const auto places = for_image(size, 1);
    if (!is_mean) return record_adaptive_avg_pool(image, symbols(places));
    // Torch's own, which keeps sizes.
    return kAxes == 3 ? at::adaptive_avg_pool3d(image, places) : at::adaptive_avg_pool2d(image, places);
  });
}

Tensor quick_pad(const Given& given) {
  Tensor x;
  c10::SmallVector<int64_t, 4> padding;
  if (!read_all(given, 0, &x, &padding) || padding.empty() || padding.size() % 2 || padding.size() > 6 ||
      (given[3] && given[3] != Py_None) || !is_unseen(x)) {
    return {};
  }
  const bool reflects = is_text(given[2], "reflect");
  if (!reflects && !is_text(given[2], "replicate")) return {};
  const int64_t batch_dims = x.dim() - static_cast<int64_t>(padding.size() / 2);
  if (batch_dims < 1 || batch_dims > 2) return {};
  return without_gil([&] {
    return reflects ? record_reflection_pad(x, symbols(padding)) : record_replication_pad(x, symbols(padding));
  });
}

PyObject* set_backend(PyObject*, PyObject* name) {
  HANDLE_TH_ERRORS
  const char* const text = PyUnicode_AsUTF8(name);
  if (!text) throw python_error();
  backend = parse_backend(text);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <Function kFunction, Py_ssize_t kMost>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<kFunction, kMost>)), METH_FASTCALL,
          "The function of plain arguments; None of others."};
}

}  // namespace

void bind_quick(py::module_& parent) {
  static PyMethodDef methods[] = {
      method<quick_adaptive_avg_pool<1>, 2>("adaptive_avg_pool1d"),
      method<quick_adaptive_avg_pool<2>, 2>("adaptive_avg_pool2d"),
      method<quick_adaptive_avg_pool<3>, 2>("adaptive_avg_pool3d"),
      method<quick_avg_pool<1>, 6>("avg_pool1d"),
      method<quick_avg_pool<2>, 7>("avg_pool2d"),
      method<quick_avg_pool<3>, 7>("avg_pool3d"),
      method<quick_batch_norm, 8>("batch_norm"),
      method<quick_convolution<1, false>, 7>("conv1d"),
      method<quick_conv2d, 7>("conv2d"),
      method<quick_convolution<3, false>, 7>("conv3d"),
      method<quick_convolution<1, true>, 8>("conv_transpose1d"),
      method<quick_convolution<2, true>, 8>("conv_transpose2d"),
      method<quick_convolution<3, true>, 8>("conv_transpose3d"),
      method<quick_dropout, 4>("dropout"),
      method<quick_gelu, 2>("gelu"),
      method<quick_group_norm, 5>("group_norm"),
      method<quick_smooth<at::hardswish, at::hardswish_>, 2>("hardswish"),
      method<quick_hardtanh, 4>("hardtanh"),
      method<quick_layer_norm, 5>("layer_norm"),
      method<quick_leaky_relu, 3>("leaky_relu"),
      method<quick_max_pool<1>, 7>("max_pool1d"),
      method<quick_max_pool<2>, 7>("max_pool2d"),
      method<quick_max_pool<3>, 7>("max_pool3d"),
      method<quick_smooth<at::mish, at::mish_>, 2>("mish"),
      method<quick_pad, 4>("pad"),
      method<quick_prelu, 2>("prelu"),
      method<quick_relu, 2>("relu"),
      method<quick_smooth<at::silu, at::silu_>, 2>("silu"),
      {"set_backend", set_backend, METH_O, "The backend of all calls from here on."},
      {nullptr, nullptr, 0, nullptr},
  };
  py::module_ m = parent.def_submodule("quick", "Layers' functions on a shorter way than through torch.ops.");
  if (PyModule_AddFunctions(m.ptr(), methods)) throw py::error_already_set();
}

}  // namespace freezekit
