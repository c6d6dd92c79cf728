// How `auto` proves a kernel of freezekit's where it is to run: it and torch's operator compute the same, once; results
// are compared, then both are timed.
//
// A proof only reads the caller's tensors and writes to its own. It draws no random numbers, records no gradient, holds
// no lock while anything runs and lets no exception out: a kernel that throws, or a device without the memory for it, is
// torch's from then on. Only a proof waits for the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "torch/backends/choices.h"

namespace freezekit::proof {

// Two ways to compute the same results.
struct Contest {
  std::function<std::vector<Tensor>(Backend)> run;
  // Values may differ by 2 * tolerance of themselves, and tolerance of the largest one; 0: they must be equal, NaN be NaN.
  double tolerance = 0;
  // What else is wrong, given the results of freezekit's kernel; nothing if all is right. May be empty.
  std::function<std::string(const std::vector<Tensor>&)> faults;
};

// Where two results differ by more than `tolerance`, in words; nothing where they do not. In pieces, of little memory.
std::string difference(const Tensor& torch_s, const Tensor& own, double tolerance);

// A tensor as every eager call has it: dense, of CPU, CUDA or Meta, of no subclass, and no tracer or transform has put
// another in its place. Views, autograd and autocast are what every tensor has.
const c10::DispatchKeySet kPlain =
    c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta,
                         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutogradMeta,
                         c10::DispatchKey::ADInplaceOrView}) |
    c10::autocast_dispatch_keyset;
inline bool is_plain(const Tensor& tensor) { return (tensor.key_set() | kPlain) == kPlain; }
// A tracer, a transform or a dispatch mode sees the calls of this thread.
bool is_watched();
// torch's settings ask for results that are the same in every run. What depends on a clock is not.
bool must_be_repeatable();

// What is known of `key`, or is found out now on the device of `on`; none where it may not be: under capture, tracing,
// transforms, dispatch modes and determinism, or while another thread is at it.
std::optional<choices::Measurement> verdict(const std::string& key, const Tensor& on,
                                            const std::function<Contest()>& contest);

}  // namespace freezekit::proof
