// What `auto` runs: ATen, unless freezekit's kernel was measured to be faster for the very problem on this device.
//
// Measuring is asked for (freezekit.autotune); until then nothing is known of a problem, and ATen is the rule.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/api.h"
#include "torch/operators.h"

namespace freezekit::choices {

// The rule of `auto` in words, for a problem that was not measured.
constexpr const char* kRule =
    "ATen, until freezekit.autotune measures this problem: no own kernel has been timed on a GPU yet";

struct Measurement {
  double aten_seconds = 0, native_seconds = 0;  // medians of interleaved runs
  bool agree = true;                            // the results are equal within rounding

  bool native_wins() const { return agree && native_seconds < aten_seconds; }
};

// A problem in words: operator, dtype, precision, sizes and settings, device. What choices are kept and exported by.
std::string key_of(Operator, const Conv2dProblem&, const Tensor& on);

std::optional<Measurement> find(const std::string& key);
void set(const std::string& key, const Measurement&);
void clear();
std::vector<std::pair<std::string, Measurement>> all();

// The backend whose kernels are measured against ATen's from now on; none ends it.
void set_tuning(std::optional<Backend> candidate);

using Compute = std::function<Tensor(Backend)>;

// Computes under `backend`: as demanded, or as `auto` decides.
Tensor compute(Operator, const Conv2dProblem&, const Tensor& on, Backend backend, const Compute&);

}  // namespace freezekit::choices
