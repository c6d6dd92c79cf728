// What computes max pooling on tensors with data, once sizes are checked and results allocated.
#pragma once

#include <utility>

#include "torch/max_pool2d/max_pool2d.h"

namespace freezekit::max_pool {

// x, y, taps (dy, taps, dx) dense and all of the layout that MaxPool says; dx holds zeros.
void forward_cpu(const MaxPool&, const Tensor& x, const Tensor& y, const Tensor& taps);
void scatter_cpu(const MaxPool&, const Tensor& dy, const Tensor& taps, const Tensor& dx);
void gather_cpu(const MaxPool&, const Tensor& x, const Tensor& taps, const Tensor& y);

Tensor scatter_by_aten(const Tensor& dy, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry&);
Tensor gather_by_aten(const Tensor& x, const Tensor& taps, const PoolGeometry&);
Tensor taps_of_indices(const Tensor& indices, const Tensor& x, const PoolGeometry&);

// Where the taps are: (positions h * W + w, whether that is inside the input), both (N, C, P, Q) and int64, bool.
std::pair<Tensor, Tensor> positions(const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry&);

}  // namespace freezekit::max_pool
