// Max pooling by taps as ATen composes it: for devices and transforms that have no kernel here.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "torch/max_pool2d/steps.h"

namespace freezekit::max_pool {

std::pair<Tensor, Tensor> positions(const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  const Tensor tap = taps.to(at::kLong);
  const auto options = tap.options();
  const Tensor p = at::arange(tap.sym_size(2), options).unsqueeze(1), q = at::arange(tap.sym_size(3), options);
  const Tensor row = tap.div(g.kernel_size[1], "floor").mul(g.dilation[0]) + p.mul(g.stride[0]) - g.padding[0];
  const Tensor column = tap.remainder(g.kernel_size[1]).mul(g.dilation[1]) + q.mul(g.stride[1]) - g.padding[1];
  const auto& h = input_size[input_size.size() - 2];
  const auto& w = input_size[input_size.size() - 1];
  const Tensor inside = row.ge(0).logical_and(row.lt(h)).logical_and(column.ge(0)).logical_and(column.lt(w));
  return {row * w + column, inside};
}

Tensor scatter_by_aten(const Tensor& dy, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  const auto [at, inside] = positions(taps, input_size, g);
  const Tensor zeros = at::zeros_symint({input_size[0], input_size[1], input_size[2] * input_size[3]}, dy.options());
  return zeros.scatter_add(2, at::where(inside, at, 0).flatten(2), at::where(inside, dy, 0).flatten(2))
      .view_symint(input_size);
}

Tensor gather_by_aten(const Tensor& x, const Tensor& taps, const PoolGeometry& g) {
  const auto [at, inside] = positions(taps, x.sym_sizes(), g);
  const Tensor taken = x.flatten(2).gather(2, at::where(inside, at, 0).flatten(2));
  return at::where(inside, taken.view_symint(taps.sym_sizes()), 0);
}

Tensor taps_of_indices(const Tensor& indices, const Tensor& x, const PoolGeometry& g) {
  const auto options = indices.options();
  const Tensor p = at::arange(indices.sym_size(2), options).unsqueeze(1), q = at::arange(indices.sym_size(3), options);
  const c10::SymInt w = x.sym_size(3);
  // Torch's kernel for NHWC on a GPU leaves index 0 for a window of nothing but -infinity, wherever that window is: its
  // first tap inside of the input is meant.
  const auto tap = [&](const Tensor& at, const Tensor& output, size_t axis) {
    const Tensor origin = output.mul(g.stride[axis]) - g.padding[axis];
    const Tensor first = origin.neg().clamp_min(0).add(g.dilation[axis] - 1).div(g.dilation[axis], "floor");
    return (at - origin).div(g.dilation[axis], "floor").maximum(first);
  };
  const Tensor row = tap(indices.div(w, "floor"), p, 0), column = tap(indices.remainder(w), q, 1);
  return (row * g.kernel_size[1] + column).to(g.tap_type());
}

}  // namespace freezekit::max_pool
