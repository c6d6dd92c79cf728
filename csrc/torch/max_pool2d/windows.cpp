#include "torch/max_pool2d/windows.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include "torch/common/checks.h"

namespace freezekit::max_pool {
namespace {

// Where each output's window begins along an axis, to be broadcast against outputs, whose last axes are `axes`.
Tensor origins(const Tensor& outputs, int axis, int axes, const AnyWindows& g) {
  const Tensor number = at::arange(outputs.sym_size(axis - axes), outputs.options().dtype(at::kLong));
  Tensor result = number.mul(g.stride[axis]).sub(g.padding[axis]);
  for (int i = axis; i < axes - 1; ++i) result = result.unsqueeze(-1);
  return result;
}

}  // namespace

void read_setting(SymIntArrayRef values, const char* name, int64_t* numbers, size_t axes) {
  TORCH_CHECK(values.size() == 1 || values.size() == axes, name, " must be one number or ",
              axes == 2 ? "two (height, width)" : "three (depth, height, width)", ", got ", values.size(),
              " of them: ", values);
  for (size_t i = 0; i < axes; ++i) {
    numbers[i] = values[values.size() == 1 ? 0 : i].guard_int(__FILE__, __LINE__);
    // torch's own checks refuse what is negative, after sums that would overflow.
    TORCH_CHECK(numbers[i] < kExtentLimit && numbers[i] > -kExtentLimit, name, " must be below ", kExtentLimit,
                " either way, got ", values);
  }
}

std::pair<Tensor, Tensor> indices_of_taps(const Tensor& taps, SymIntArrayRef input_size, const AnyWindows& g) {
  const int axes = static_cast<int>(g.stride.size());
  const SymIntArrayRef extents = input_size.slice(input_size.size() - axes);
  Tensor rest = taps.to(at::kLong), indices, inside;
  c10::SymInt step = 1;
  for (int axis = axes - 1; axis >= 0; --axis) {
    const Tensor tap = axis > 0 ? rest.remainder(g.kernel_size[axis]) : rest;
    const Tensor place = tap.mul(g.dilation[axis]).add(origins(taps, axis, axes, g));
    const Tensor here = place.ge(0).logical_and(place.lt(extents[axis]));
    inside = inside.defined() ? inside.logical_and(here) : here;
    indices = indices.defined() ? indices.add(place.mul(step)) : place;
    if (axis > 0) rest = rest.div(g.kernel_size[axis], "floor");
    step *= extents[axis];
  }
  return {indices, inside};
}

// Of a window of nothing but -infinity some of torch's kernels leave an index outside of it: index 0 on a GPU in NHWC, on
// a CPU one in the first plane. Rounding up and clamping makes that the window's first tap inside the input, as elsewhere.
Tensor taps_of_indices(const Tensor& indices, SymIntArrayRef input_size, const AnyWindows& g) {
  const int axes = static_cast<int>(g.stride.size());
  const SymIntArrayRef extents = input_size.slice(input_size.size() - axes);
  Tensor rest = indices, taps;
  int64_t step = 1;
  for (int axis = axes - 1; axis >= 0; --axis) {
    const Tensor place = axis > 0 ? rest.remainder(extents[axis]) : rest;
    const Tensor offset = place.sub(origins(indices, axis, axes, g)).add(g.dilation[axis] - 1);
    const Tensor tap = offset.div(g.dilation[axis], "floor").clamp(0, g.kernel_size[axis] - 1).mul(step);
    taps = taps.defined() ? taps.add(tap) : tap;
    if (axis > 0) rest = rest.div(extents[axis], "floor");
    step *= g.kernel_size[axis];
  }
  return taps;
}

}  // namespace freezekit::max_pool
