// Checked once, at the torch boundary: what a call must satisfy before any kernel sees it.
//
// Templates over the integer type: int64_t for a call on data, c10::SymInt for shape propagation.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <type_traits>

#include "torch/common/operators.h"

namespace freezekit {

template <class Int>
using Sizes = c10::ArrayRef<Int>;
template <class Int>
using SizeVector = c10::SmallVector<Int, 4>;

// No settings below reach the end of int64 in any product that a check or a kernel forms: a size that lies must not wrap.
constexpr int64_t kExtentLimit = int64_t{1} << 31;

void check_geometry(const Geometry&);
// Where only ATen's formulas serve (`what`), freezekit's own kernels must not have been demanded.
void check_formula_backend(Backend, const char* what);
// A defined tensor of a layout that convolutions exist for.
void check_operand(const Tensor&, const char* name);
// Two operands of one device and one dtype.
void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);
// No negative size, and not more elements than can be addressed.
void check_extents(IntArrayRef size, const char* name);
void check_extents(SymIntArrayRef size, const char* name);

template <class Int>
void check_rank(Sizes<Int> size, const char* name, const char* axes) {
  TORCH_CHECK(size.size() == 4, name, " must have 4 dimensions (", axes, "), got ", size.size(), ": ", size);
}

// Checks sizes against each other and returns the output size (N, K, P, Q).
template <class Int>
SizeVector<Int> checked_output_size(Sizes<Int> input, Sizes<Int> weight, const Geometry& g) {
  check_rank(input, "input", "N, C, H, W");
  check_rank(weight, "weight", "out_channels, in_channels / groups, kernel height, kernel width");
  check_extents(input, "input");
  check_extents(weight, "weight");
  TORCH_CHECK(weight[0] >= 1 && weight[1] >= 1 && weight[2] >= 1 && weight[3] >= 1,
              "weight must have no empty dimension, got ", weight);
  TORCH_CHECK(weight[2] <= kExtentLimit && weight[3] <= kExtentLimit, "weight must have a kernel of at most 2^31 ",
              "elements a side, got ", weight);
  // This one first: with it, groups is at most weight[0], and the product of the next line cannot overflow.
  TORCH_CHECK(weight[0] % g.groups == 0, "weight has ", weight[0], " output channels, which groups=", g.groups,
              " does not divide");
  TORCH_CHECK(input[1] == weight[1] * g.groups, "input has ", input[1], " channels, weight of size ", weight,
              " with groups=", g.groups, " needs ", weight[1] * g.groups);
  SizeVector<Int> output = {input[0], weight[0], Int(0), Int(0)};
  for (size_t i = 0; i < 2; ++i) {
    const Int padded = input[2 + i] + 2 * g.padding[i];
    const Int reach = g.dilation[i] * (weight[2 + i] - 1) + 1;
    TORCH_CHECK(input[2 + i] >= 1 && padded >= reach, "the dilated kernel must fit into the padded input along ",
                i == 0 ? "height" : "width", ": it spans ", reach, ", the padded input ", padded, " (input ",
                input[2 + i], ", padding ", g.padding[i], ", kernel ", weight[2 + i], ", dilation ", g.dilation[i], ")");
    output[2 + i] = (padded - reach) / g.stride[i] + 1;
  }
  return output;
}

// grad_output against what conv2d of these sizes gives.
template <class Int>
void check_grad_output(Sizes<Int> grad_output, Sizes<Int> input, Sizes<Int> weight, const Geometry& g) {
  check_rank(grad_output, "grad_output", "N, out_channels, P, Q");
  const SizeVector<Int> expected = checked_output_size(input, weight, g);
  for (size_t i = 0; i < 4; ++i) {
    TORCH_CHECK(grad_output[i] == expected[i], "grad_output must have size ", Sizes<Int>(expected),
                " for input_size ", input, " and weight_size ", weight, ", got ", grad_output);
  }
}

template <class Int>
void check_bias(Sizes<Int> bias, Sizes<Int> weight) {
  TORCH_CHECK(bias.size() == 1 && bias[0] == weight[0], "bias must have size [", weight[0],
              "], one value an output channel, got ", bias);
}

template <class Int>
Sizes<Int> sizes_of(const Tensor& tensor) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return tensor.sizes();
  } else {
    return tensor.sym_sizes();
  }
}

// The whole check of each operator. conv2d's returns the output size.
template <class Int>
SizeVector<Int> check_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Geometry& g) {
  check_geometry(g);
  check_same(input, "input", weight, "weight");
  const auto output = checked_output_size<Int>(sizes_of<Int>(input), sizes_of<Int>(weight), g);
  if (bias && bias->defined()) {
    check_same(input, "input", *bias, "bias");
    check_bias<Int>(sizes_of<Int>(*bias), sizes_of<Int>(weight));
  }
  return output;
}

template <class Int>
void check_dgrad(const Tensor& grad_output, const Tensor& weight, Sizes<Int> input_size, const Geometry& g) {
  check_geometry(g);
  check_same(grad_output, "grad_output", weight, "weight");
  check_grad_output<Int>(sizes_of<Int>(grad_output), input_size, sizes_of<Int>(weight), g);
}

template <class Int>
void check_wgrad(const Tensor& grad_output, const Tensor& input, Sizes<Int> weight_size, const Geometry& g) {
  check_geometry(g);
  check_same(grad_output, "grad_output", input, "input");
  check_grad_output<Int>(sizes_of<Int>(grad_output), sizes_of<Int>(input), weight_size, g);
}

}  // namespace freezekit
