// How `auto` proves a kernel of freezekit's where it is to run: it and torch's operator compute the same, once; results
// are compared, then both are timed.
//
// What is compared first are results on values of a proof's own (own_values.h): what a caller's tensors hold cannot hide a
// fault. A proof only reads the caller's tensors and writes to its own. It draws no random numbers, records no gradient, holds
// no lock while anything runs and lets no exception out: a kernel that throws, or a device without the memory for it, is
// torch's from then on. Only a proof waits for the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>

#include "torch/backends/choices.h"

namespace freezekit::proof {

// How far results may be apart: by of_value of the value itself, and by of_largest of the largest. 0: they must be equal,
// NaN be NaN. Else they are sums, in which an overflow or an infinity may come out as another number that is not finite.
struct Bound {
  double of_value = 0, of_largest = 0;
};

// Two ways to compute the same.
struct Contest {
  // What is wrong with freezekit's kernel; nothing if all is right. Runs both ways at least once as they are timed, so
  // that code is loaded and memory is at hand.
  std::function<std::string()> faults;
  // On tensors as large as the caller's.
  std::function<void(Backend)> run;
};

// What is said of a device that had no memory left: true of a moment, not of the kernel.
constexpr const char* kNoMemory = "no memory was left to compare them";
// And of a device that is older than all that was compiled for.
constexpr const char* kNoCode = "this build has no code for such a device";

// Of convolutions: true of the call's numbers, not of the kernel.
constexpr const char* kUntold = "its first call's sums cancel: the rounding that is left of them tells nothing";

// Where two results are further apart, in words; nothing where they are not. Takes 16 MiB at most. Where `large` is larger
// than the largest value, the bound is of that.
std::string difference(const Tensor& expected, const Tensor& own, const Bound& = {}, double large = 0);
// The largest absolute value, of those that are finite.
double largest_in(const Tensor&);

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

// What is known of `key`, if it counts now: where results must be the same in every run, what was loaded alone.
std::optional<choices::Measurement> known(const std::string& key);
// The same, or is found out now on the device of `on`; none where it may not be: under capture, tracing,
// transforms, dispatch modes and determinism, and where nothing may wait for the device.
std::optional<choices::Measurement> verdict(const std::string& key, const Tensor& on,
                                            const std::function<Contest()>& contest);

// Of layers around convolutions, a layer's kernels of both passes (layer_proofs.cpp). They are compared on values of a
// proof's own, and timed on a part of the layer's input, of which they hold no more than a result of torch's two passes.
// Activations come with the gate that is their gradient, dropout with the mask as bits, of which nothing is drawn, max
// pooling with both maps by taps.
Contest activations(const Tensor& x);
Contest dropout(const Tensor& x);
Contest max_pool2d(const Tensor& x);
// Whether kernels could read such a tensor without a copy.
bool is_dense(const Tensor& x);
bool is_image_batch(const Tensor& x);

}  // namespace freezekit::proof
