// Max pooling by taps as ATen composes it: for devices and transforms that have no kernel here.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "torch/max_pool2d/steps.h"

namespace freezekit::max_pool {

Tensor scatter_by_aten(const Tensor& dy, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  const auto [at, inside] = indices_of_taps(taps, input_size, g);
  const Tensor zeros = at::zeros_symint({input_size[0], input_size[1], input_size[2] * input_size[3]}, dy.options());
  return zeros.scatter_add(2, at::where(inside, at, 0).flatten(2), at::where(inside, dy, 0).flatten(2))
      .view_symint(input_size);
}

Tensor gather_by_aten(const Tensor& x, const Tensor& taps, const PoolGeometry& g) {
  const auto [at, inside] = indices_of_taps(taps, x.sym_sizes(), g);
  const Tensor taken = x.flatten(2).gather(2, at::where(inside, at, 0).flatten(2));
  return at::where(inside, taken.view_symint(taps.sym_sizes()), 0);
}

}  // namespace freezekit::max_pool
