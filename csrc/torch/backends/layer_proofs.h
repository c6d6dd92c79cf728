// What is held against torch's operators before `auto` takes freezekit's kernels for the layers around convolutions: a
// layer's kernels of both passes. They are compared on values of a proof's own, and timed on a part of the layer's input,
// of which they hold no more than a result of torch's two passes.
#pragma once

#include "torch/backends/proof.h"

namespace freezekit::proof {

// Whether kernels could read such a tensor without a copy.
bool is_dense(const Tensor& x);
bool is_image_batch(const Tensor& x);

// Activations with one bit per element, and the gate that is their gradient.
Contest activations(const Tensor& x);
// Dropout's mask as bits, and the gate. Nothing is drawn.
Contest dropout(const Tensor& x);
// Max pooling by taps, and both maps by them.
Contest max_pool2d(const Tensor& x);

}  // namespace freezekit::proof
