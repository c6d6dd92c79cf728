#include "torch/common/route.h"

#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <cstdio>

namespace freezekit {
namespace {

constexpr std::array<const char*, kOps> kNames = {
    "conv2d",     "conv2d_dgrad", "conv2d_wgrad",       "conv2d_bias_grad",  "frozen_conv2d", "activation",
    "gate",       "dropout",      "max_pool2d",         "max_pool2d_scatter", "max_pool2d_gather", "convolution",
    "batch_norm", "layer_norm",   "group_norm",         "max_pool3d", "avg_pool",          "adaptive_avg_pool", "reflection_pad",
    "replication_pad"};
constexpr std::array<const char*, 4> kComputers = {"torch's own formula", "ATen", "freezekit's CPU kernels",
                                                   "freezekit's kernels"};

constexpr const char* kNotFloating = "a tensor is not of a real floating dtype";

// Layers of which nothing is kept where no gradient is recorded: torch's operator is the shortest way then.
bool keeps_for_gradient_alone(Op op) {
  return op == Op::activation || op == Op::dropout || op == Op::max_pool2d || !has_kernels(op);
}

bool has_cpu_kernels(Op op) {
  return op == Op::activation || op == Op::gate || op == Op::dropout || op == Op::max_pool2d ||
         op == Op::max_pool2d_scatter || op == Op::max_pool2d_gather;
}

// What `auto` and `aten` mean for a layer. On the meta device a layer keeps what it keeps on a CPU.
Route automatic(Op op, c10::DeviceType device) {
  if (!has_cpu_kernels(op)) return {Computer::aten, "ATen computes it"};
  if (device == c10::DeviceType::CPU || device == c10::DeviceType::Meta) return {Computer::cpu, "it runs on a CPU"};
  return {Computer::formula, "no kernel of freezekit's has been proven on this device"};
}

// That a demand for freezekit's kernels can be met.
void check_demand(Op op, Backend backend, const Facts& facts) {
  if (facts.device == c10::DeviceType::Meta) return;
  const auto wanted = backend == Backend::native ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
  if (facts.device != wanted) {
    refuse(to_string(op), backend, "it needs " + c10::DeviceTypeName(wanted) + " tensors, got one on " +
                                       c10::DeviceTypeName(facts.device, /*lower_case=*/true));
  }
  if (!native::dtype_of(facts.dtype)) {
    refuse(to_string(op), backend,
           std::string("it takes float32, float64, float16 and bfloat16, got ") + c10::toString(facts.dtype));
  }
  kernel_library(backend);
}

// The kernels that could run instead of ATen's on such a device; none where this build or device has none.
std::optional<Backend> candidate_on(c10::DeviceType device) {
  if (device == c10::DeviceType::CUDA && has_cuda_kernels()) return Backend::native;
  const bool emulated = device == c10::DeviceType::CPU && choices::tuned() == Backend::emulated;
  return emulated ? std::make_optional(Backend::emulated) : std::nullopt;
}

std::string in_microseconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g us", seconds * 1e6);
  return text;
}

// As was measured for this very problem, or is measured now; ATen where nothing is known.
Backend measured(const Conv2dStep& step, const Run& run) {
  const auto candidate = candidate_on(step.on.device().type());
  if (!candidate) return Backend::aten;
  const c10::DeviceGuard guard(step.on.device());
  const choices::Setting setting{step.on.scalar_type(), step.layout, step.on.device().type(),
                                 native::target_on(kernel_library(*candidate), *candidate), step.variant};
  const std::string key = choices::key_of(step.op, step.problem, setting);
  auto found = choices::find(key);
  if (!found && choices::tuned() == candidate && native::supports(step.op, step.problem, step.on, *candidate) &&
      !native::is_capturing(step.on)) {
    found = choices::measure(*candidate, step.on, run);
    choices::set(key, *found);
  }
  return found && found->native_wins() ? *candidate : Backend::aten;
}

}  // namespace

const char* to_string(Op op) { return kNames[static_cast<size_t>(op)]; }
const char* to_string(Computer computer) { return kComputers[static_cast<size_t>(computer)]; }

const char* obstacle_in(const Tensor& tensor) {
  // Transforms and forward-mode AD want formulas that a node in C++ cannot give, and torch has.
  constexpr c10::DispatchKeySet transforms({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  if (tensor.key_set().has_any(transforms)) return "a tensor belongs to a torch.func transform";
  if (torch::autograd::isFwGradDefined(tensor)) return "a tensor has a forward-mode gradient";
  if (tensor.layout() != at::kStrided || tensor.is_nested()) return "a tensor is not a dense, strided one";
  if (!at::isFloatingType(tensor.scalar_type())) return kNotFloating;
  return nullptr;
}

Route route(Op op, Backend backend, const Facts& facts) {
  const bool demanded = is_own(backend) && has_kernels(op);
  if (facts.obstacle) {
    if (demanded) {
      const bool of_dtype = facts.obstacle == kNotFloating;
      refuse(to_string(op), backend, facts.obstacle + (of_dtype ? std::string(", got ") + c10::toString(facts.dtype) : ""));
    }
    return {Computer::formula, facts.obstacle};
  }
  if (demanded) {
    check_demand(op, backend, facts);
    return {Computer::kernels, "as demanded"};
  }
  if (!facts.records && keeps_for_gradient_alone(op)) {
    return {Computer::formula, "no gradient is recorded, so there is nothing to keep"};
  }
  return automatic(op, facts.device);
}

void refuse(std::string_view what, Backend backend, const std::string& why) {
  TORCH_CHECK(false, "backend='", to_string(backend), "' cannot compute ", what, ": ", why,
              "; backend='aten' computes it");
}

Tensor computed_by_choice(const Conv2dStep& step, Backend backend, const Run& run) {
  if (backend != Backend::automatic) {
    route_step(op_of(step.op), backend, step.on);  // refuses what cannot be
    return run(backend);
  }
  const native::WithoutHopper without_hopper;  // what is chosen never leads there
  return run(measured(step, run));
}

Foreseen foreseen(Operator op, const Conv2dProblem& problem, const choices::Setting& setting) {
  const auto candidate = candidate_on(setting.device);
  const auto found = candidate ? choices::find(choices::key_of(op, problem, setting)) : std::nullopt;
  if (!found) return {Backend::aten, choices::kRule};
  const std::string times = "measured: ATen " + in_microseconds(found->aten_seconds) + ", own kernel " +
                            in_microseconds(found->native_seconds);
  return {found->native_wins() ? *candidate : Backend::aten,
          found->agree ? times : times + ", but the results differ"};
}

}  // namespace freezekit
