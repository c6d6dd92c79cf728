// Autograd of convolutions of any number of dimensions, for whoever computes their value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <c10/core/SymInt.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <vector>

#include "torch/autograd/formula.h"
#include "torch/backends/aten.h"
#include "torch/common/operators.h"

namespace freezekit {

using Numbers = std::vector<c10::SymInt>;

struct ConvNdGeometry {
  using Flat = Arguments<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, SymIntArrayRef, c10::SymInt>;

  ConvNdGeometry() = default;
  ConvNdGeometry(SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
                 SymIntArrayRef output_padding, c10::SymInt groups)
      : stride(owned(stride)), padding(owned(padding)), dilation(owned(dilation)),
        output_padding(owned(output_padding)), transposed(transposed), groups(std::move(groups)) {}

  template <class F>
  auto apply(const F& f) const {
    return f(stride, padding, dilation, transposed, output_padding, groups);
  }

  Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) const {
    return at::convolution_symint(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }
  operator aten::Convolution() const { return {stride, padding, dilation, output_padding, groups, transposed}; }

  Numbers stride, padding, dilation, output_padding;
  bool transposed = false;
  c10::SymInt groups = 1;
};

// freezekit::convolution where autograd has its turn.
Tensor record_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const ConvNdGeometry&);

// compute(), run below autograd, as the result of a convolution of which one operand or more requires a gradient: its
// node keeps what the gradients asked for read. The bias may be undefined.
Tensor record_convolution(const Tensor& input, const Tensor& weight, const Tensor& bias, const ConvNdGeometry&,
                          c10::function_ref<Tensor()> compute);

}  // namespace freezekit
