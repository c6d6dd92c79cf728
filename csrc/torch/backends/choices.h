// Measured choices between ATen and freezekit's kernels: what `auto` knows of a convolution on this device.
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

// The backend whose kernels are measured against ATen's from now on; none ends it.
void set_tuning(std::optional<Backend> candidate);

std::optional<Backend> tuned();

// Whether anything is known or to be measured: false, and cheap, as long as nobody has asked for a measurement.
bool are_known();

// Runs both, compares their results and times them. `on` is an operand, for its device.
Measurement measure(Backend candidate, const Tensor& on, const std::function<Tensor(Backend)>& run);

}  // namespace freezekit::choices
