// What `auto` runs: ATen, unless freezekit's kernel was measured to be faster for the very problem on this device.
//
// Measuring is asked for (freezekit.tuning.autotune); until then nothing is known of a problem, and ATen is the rule.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/api.h"
#include "torch/backends/native.h"
#include "torch/common/operators.h"

namespace freezekit::choices {

// The rule of `auto` in words, for a problem that was not measured.
constexpr const char* kRule =
    "ATen, until freezekit.tuning.autotune measures this problem: no own kernel has been timed on a GPU yet";

struct Measurement {
  double aten_seconds = 0, native_seconds = 0;  // medians of interleaved runs
  bool agree = true;                            // the results are equal within rounding

  bool native_wins() const { return agree && native_seconds < aten_seconds; }
};

// What a problem's time depends on beside its sizes.
struct Setting {
  at::ScalarType dtype;
  at::MemoryFormat layout;    // of the result
  c10::DeviceType device;
  Target target;              // of the own kernels there
  std::string_view variant = {};  // what is computed beside the operator; nothing for the plain one
};

// A problem in words: what choices are kept and exported by.
std::string key_of(Operator, const Conv2dProblem&, const Setting&);

std::optional<Measurement> find(const std::string& key);
void set(const std::string& key, const Measurement&);
void clear();
std::vector<std::pair<std::string, Measurement>> all();

// What `auto` takes for a problem as things stand, and why.
struct Answer {
  Backend backend;
  std::string reason;
};
Answer answer(Operator, const Conv2dProblem&, const Setting&);

// The backend whose kernels are measured against ATen's from now on; none ends it.
void set_tuning(std::optional<Backend> candidate);

using Compute = std::function<Tensor(Backend)>;

// What an operator is about to compute: `on` is an operand, for dtype and device.
struct Question {
  Operator op;
  const Conv2dProblem& problem;
  const Tensor& on;
  at::MemoryFormat layout;
  std::string_view variant = {};
};

// Whether `auto` may be anything but ATen: false, and cheap, as long as nobody has asked for a measurement.
bool are_known();

// The backend that `auto` means for it; where it is to be measured, `run` is called with each of both.
Backend decide(const Question&, const Compute& run);

// The backend that computes under `backend`, never `automatic`: as demanded, or as `auto` decides. Throws where it is
// demanded and cannot run.
Backend settle(const Question&, Backend backend, const Compute& run);

// Computes under `backend`.
template <class Run>
Tensor compute(const Question& question, Backend backend, const Run& run) {
  if (backend == Backend::aten || (backend == Backend::automatic && !are_known())) return run(Backend::aten);
  std::optional<native::WithoutHopper> without_hopper;
  if (backend == Backend::automatic) without_hopper.emplace();
  return run(settle(question, backend, run));
}

}  // namespace freezekit::choices
