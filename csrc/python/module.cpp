// freezekit._C: what Python asks of the build that torch's dispatcher does not carry.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "kernels/api.h"
#include "python/bindings.h"
#include "torch/backends/kernel_library.h"
#include "torch/backends/launch_log.h"
#include "torch/backends/native.h"
#include "torch/backends/route.h"

using namespace freezekit;

namespace {

constexpr std::array<const char*, 3> kOperators = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"};
constexpr std::array<const char*, 4> kDTypes = {"float32", "float64", "float16", "bfloat16"};
constexpr std::array<at::ScalarType, 4> kScalarTypes = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};
constexpr std::array<const char*, 2> kDevices = {"cpu", "cuda"};
constexpr std::array<const char*, 5> kFamilies = {"none", "direct", "implicit_gemm", "depthwise", "hopper"};

template <size_t N>
int index_of(const std::array<const char*, N>& names, const std::string& name, const char* argument) {
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  throw py::value_error(std::string(argument) + " is unknown: '" + name + "'");
}

py::dict choose(const std::string& op, const std::string& dtype, const Sizes& input, const Sizes& weight,
                const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups, int sm, int sm_count,
                bool allow_tf32, bool deterministic, bool hopper, const std::string& device, bool channels_last) {
  Target target;
  target.sm = sm, target.sm_count = sm_count, target.allow_tf32 = allow_tf32, target.deterministic = deterministic;
  target.hopper = hopper;
  const auto computes = static_cast<Operator>(index_of(kOperators, op, "operator"));
  const int type = index_of(kDTypes, dtype, "dtype");
  const Conv2dProblem problem = make_problem(input, weight, stride, padding, dilation, groups);
  const Selection chosen = select(computes, problem, static_cast<DType>(type), target);
  const choices::Setting setting = {
      kScalarTypes[type], channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous,
      index_of(kDevices, device, "device") == 0 ? c10::DeviceType::CPU : c10::DeviceType::CUDA, target};
  const Foreseen taken = foreseen(computes, problem, setting);
  py::dict result;
  result["family"] = kFamilies[static_cast<size_t>(chosen.family)];
  result["kernel"] = chosen.kernel;
  result["config"] = chosen.config;
  result["split_k"] = chosen.split_k;
  result["workspace_bytes"] = chosen.workspace_bytes;
  result["reason"] = chosen.reason;
  result["class"] = choices::class_of(computes, problem, setting, chosen);
  result["auto"] = std::string(to_string(taken.backend));
  result["auto_kernel"] = taken.kernel;
  result["auto_reason"] = taken.why;
  return result;
}

py::list take_launch_log() {
  py::list result;
  for (const launch_log::Record& record : launch_log::take()) {
    py::dict row;
    row["operator"] = record.op;
    row["kernel"] = record.kernel;
    row["backend"] = std::string(to_string(record.backend));
    if (record.bytes) row["bytes"] = record.bytes;
    for (const auto& [name, size] : record.sizes) row[name] = py::tuple(py::cast(size));
    result.append(row);
  }
  return result;
}

}  // namespace

Conv2dProblem freezekit::make_problem(const Sizes& input, const Sizes& weight, const Pair& stride, const Pair& padding,
                                      const Pair& dilation, int64_t groups) {
  if (stride[0] < 1 || stride[1] < 1 || dilation[0] < 1 || dilation[1] < 1 || groups < 1) {
    throw py::value_error("stride, dilation and groups must be positive");
  }
  Conv2dProblem p;
  p.n = input[0], p.c = input[1], p.h = input[2], p.w = input[3];
  p.k = weight[0], p.r = weight[2], p.s = weight[3];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.groups = groups;
  p.p = output_size(p.h, p.r, p.pad_h, p.stride_h, p.dilation_h);
  p.q = output_size(p.w, p.s, p.pad_w, p.stride_w, p.dilation_w);
  if (p.p < 1 || p.q < 1 || p.c != weight[1] * groups || p.k % groups != 0) {
    throw py::value_error("input and weight sizes do not make a convolution");
  }
  return p;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "freezekit's compiled half: operators register themselves with torch on import.";
  m.def("has_cuda_kernels", &has_cuda_kernels, "Whether CUDA kernels were compiled into this binary.");
  m.def(
      "refuse",
      [](const std::string& what, const std::string& backend, const std::string& why) {
        refuse(what, parse_backend(backend), why);
      },
      py::arg("what"), py::arg("backend"), py::arg("why"), "Raises: `backend` demands what cannot be.");
  m.def("set_emulator_path", &set_emulator_path, py::arg("path"), "Where the emulated kernels' library is.");
  m.def("set_hopper", &native::set_hopper, py::arg("allowed"),
        "Whether calls that demand native or emulated kernels may run those of sm_90a.");
  m.def("set_launch_log", &launch_log::set_enabled, py::arg("enabled"), "Switches the log of kernel launches.");
  m.def("take_launch_log", &take_launch_log,
        "The launches since the last call: operator, kernel, backend, sizes by tensor.");
  m.def("select", &choose,
        "Which kernel the native backend would run, and why; what backend 'auto' takes, and why. Needs no device.",
        py::arg("operator"), py::arg("dtype"), py::arg("input_size"), py::arg("weight_size"),
        py::arg("stride") = Pair{1, 1}, py::arg("padding") = Pair{0, 0}, py::arg("dilation") = Pair{1, 1},
        py::arg("groups") = 1, py::kw_only(), py::arg("sm") = 80, py::arg("sm_count") = 108,
        py::arg("allow_tf32") = false, py::arg("deterministic") = false, py::arg("hopper") = false,
        py::arg("device") = "cuda", py::arg("channels_last") = false);
  bind_blocks(m);
  bind_chains(m);
  bind_choices(m);
  bind_enable(m);
  bind_quick(m);
  bind_tiles(m);
}
