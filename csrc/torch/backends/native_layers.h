// The layers around convolutions by freezekit's own kernels: CUDA ones on a GPU, the emulated build on a CPU.
//
// Tensors are checked and allocated before; of each call they are dense, of one memory order and one device. They may
// be one tensor where the kernels say so.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/api.h"
#include "torch/common/operators.h"

namespace freezekit {

// What a gate makes of an element: on * x where its bit is set, else off * x; off = None selects 0.
struct GateRule {
  double on = 1;
  std::optional<double> off;
};

// The gradient of an activation.
inline GateRule gate_of(const PiecewiseActivation& f) {
  return {1, f.kind == ActivationKind::leaky_relu ? std::optional<double>(f.a) : std::nullopt};
}

namespace native {

// What torch's own operator makes of x.
Tensor by_torch(const PiecewiseActivation&, const Tensor& x);

void activation(const PiecewiseActivation&, const Tensor& x, const Tensor& y, const Tensor& bits);
void gate(const GateRule&, const Tensor& x, const Tensor& bits, const Tensor& out);
void pack_bytes(const Tensor& keep, const Tensor& bits);

void max_pool(const MaxPool&, const Tensor& x, const Tensor& y, const Tensor& taps);
void max_pool_scatter(const MaxPool&, const Tensor& dy, const Tensor& taps, const Tensor& dx);
void max_pool_gather(const MaxPool&, const Tensor& x, const Tensor& taps, const Tensor& y);

}  // namespace native
}  // namespace freezekit
