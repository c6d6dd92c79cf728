// What `auto` knows of the device at hand: where torch's way and freezekit's kernels were held against each other (see
// proof.h), whether they agreed, and which was faster. Choices are kept by a text, which is what they are exported by.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/api.h"
#include "torch/common/operators.h"

namespace freezekit::choices {

// The rule of `auto` in words, for a convolution of which nothing is known.
constexpr const char* kRule =
    "ATen, until an own kernel has been held against it on this device, was equal and not slower";

struct Measurement {
  double aten_seconds = 0, native_seconds = 0;  // medians of interleaved runs; both 0 where nothing was timed
  bool agree = false;                           // the results are equal, sums within their bound
  std::string note;                             // why they do not agree
  bool loaded = false;                          // from an export, not measured in this process

  bool native_wins() const { return agree && native_seconds <= aten_seconds; }
};

// What a problem's time depends on beside its sizes.
struct Setting {
  at::ScalarType dtype;
  at::MemoryFormat layout;  // of the result
  c10::DeviceType device;
  Target target;                  // of the own kernels there
  std::string_view variant = {};  // what is computed beside the operator; nothing for the plain one
};

// A problem in words.
std::string key_of(Operator, const Conv2dProblem&, const Setting&);
// The class that it belongs to: what is computed by the same code of a filter's extent and stride, to a power of four of
// its operations. Another batch or image size meets a handful of classes at most. One kernel's name stands for several
// ways through it: by the powers of two in both numbers of channels, and by how the slices of a sum are added.
std::string class_of(Operator, const Conv2dProblem&, const Setting&, const Selection&);
// A layer around convolutions in words; `layout` is nothing where kernels do not know one.
std::string key_of(const char* layer, bool large, const char* layout, const Setting&);

// Of the kernels of sm_90a, whose self-test has passed on such a device where this is known and agreed.
std::string hopper_key(const Setting&);

std::optional<Measurement> find(const std::string& key);
void set(const std::string& key, const Measurement&);
// Sets what is not known yet. What is known then, and whether it is this: of several threads that measured one key at once
// the first decides for all.
std::pair<Measurement, bool> settle(const std::string& key, const Measurement&);
void clear();
std::vector<std::pair<std::string, Measurement>> all();
// Another number whenever anything else is known than before.
uint64_t generation();

// The kernels that compete with torch's operators on such a device; none where this build or device has none.
std::optional<Backend> candidate_on(c10::DeviceType);

// For tests: while this is set a CPU stands for a GPU, the emulated kernels for its kernels, and their times are
// multiplied by it, so that which is faster depends on no machine.
void emulate(std::optional<double> handicap);
double handicap();

}  // namespace freezekit::choices
