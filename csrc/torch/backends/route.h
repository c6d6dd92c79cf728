// Who computes a call, and why: decided here and nowhere else. The entries of autograd ask, then the steps below them,
// `_C.select` and with it `explain`; a demand that cannot be met is refused here, in one wording.
//
//   route(op, backend, tensors...)   at an entry of autograd, by what the tensors of a call are
//   route_step(op, backend, on)      below autograd, by what the tensor is that is computed on
//   computed(step, backend, run)     a convolution on data, whose sizes are known too
//   foreseen(op, problem, setting)   the same as things stand, for those who only want to know
//
// What `auto` means on a GPU the device at hand decides: a kernel is taken where proof.h found it equal to torch's operator
// and not slower. Until then, and where it did not, the call is torch's own, with torch's formula for its gradient.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>
#include <string_view>

#include "torch/backends/choices.h"
#include "torch/backends/conv2d_proofs.h"
#include "torch/backends/native.h"
#include "torch/common/operators.h"

namespace freezekit {

enum class Op : int8_t {
  conv2d,
  conv2d_dgrad,
  conv2d_wgrad,
  conv2d_bias_grad,
  frozen_conv2d,
  activation,
  gate,
  dropout,
  max_pool2d,
  max_pool2d_scatter,
  max_pool2d_gather,
  // These have no kernels of their own and never will: no backend changes what computes them.
  convolution,
  batch_norm,
  layer_norm,
  group_norm,
  max_pool3d,
  avg_pool,
  adaptive_avg_pool,
  reflection_pad,
  replication_pad,
};
constexpr size_t kOps = static_cast<size_t>(Op::replication_pad) + 1;

const char* to_string(Op);
inline Op op_of(Operator op) { return static_cast<Op>(op); }  // fprop, dgrad and wgrad come first
inline bool has_kernels(Op op) { return op < Op::convolution; }

enum class Computer : int8_t {
  formula,  // torch's operator with torch's formula for its gradient: it keeps what torch keeps
  aten,     // ATen's operators, under a node of ours
  cpu,      // csrc/cpu
  kernels,  // csrc/kernels: on a GPU, or emulated on a CPU
};

const char* to_string(Computer);
// Whether a kernel of freezekit's computes, on a CPU or a GPU.
inline bool has_kernel(Computer computer) { return computer == Computer::cpu || computer == Computer::kernels; }

struct Route {
  Computer computer;
  const char* why;  // static storage
};

// What a decision reads of a call's tensors.
struct Facts {
  c10::DeviceType device = c10::DeviceType::CPU;
  at::ScalarType dtype = at::kFloat;
  const char* obstacle = nullptr;  // why torch's formula alone serves; null where nothing stands in the way
  bool records = true;             // a gradient is recorded
  const Tensor* on = nullptr;      // what is computed on
  bool is_step = false;            // below autograd: what is to be computed is settled, only by whom is not
};

// Why a call with such a tensor is left to torch's formula; null where it need not be.
const char* obstacle_in(const Tensor&);

Route route(Op, Backend, const Facts&);

// Undefined tensors do not count.
template <class... Tensors>
Route route(Op op, Backend backend, const Tensor& first, const Tensors&... others) {
  Facts facts{first.device().type(), first.scalar_type(), nullptr,
              torch::autograd::compute_requires_grad(first, others...), &first};
  const auto look = [&](const Tensor& tensor) {
    if (facts.obstacle || !tensor.defined()) return;
    facts.obstacle = obstacle_in(tensor);
    if (facts.obstacle) facts.dtype = tensor.scalar_type();
  };
  look(first);
  (look(others), ...);
  return route(op, backend, facts);
}

inline Route route_step(Op op, Backend backend, const Tensor& on) {
  return route(op, backend, Facts{on.device().type(), on.scalar_type(), nullptr, true, &on, /*is_step=*/true});
}

// Throws: `backend` demands what cannot be, for the reason given.
[[noreturn]] void refuse(std::string_view what, Backend, const std::string& why);

// What `run` gives with the backend that computes under `backend`: as demanded, or as was proven, which may call it for
// both.
Tensor computed_by_choice(const Conv2dStep&, Backend, Run, Rehearse);

// Whether ATen computes under `backend`, whatever the problem.
inline bool is_left_to_aten(Backend backend, const Tensor& on) {
  return backend == Backend::aten || (backend == Backend::automatic && !choices::candidate_on(on.device().type()));
}

template <class F, class G>
Tensor computed(const Conv2dStep& step, Backend backend, const F& run, const G& rehearse) {
  return is_left_to_aten(backend, step.on) ? run(Backend::aten) : computed_by_choice(step, backend, run, rehearse);
}

// What `auto` takes for a convolution, and why; `kernel` where that is one of freezekit's.
struct Foreseen {
  Backend backend;
  const char* kernel;
  std::string why;
};
Foreseen foreseen(Operator, const Conv2dProblem&, const choices::Setting&);

}  // namespace freezekit
