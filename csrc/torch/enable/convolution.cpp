// Convolutions of one to three dimensions, transposed ones too, with a frozen weight: the input is not kept. Nor is it with
// a weight that learns, where it can be computed again from what the graph keeps.
#include <ATen/core/Tensor.h>

#include "torch/common/layout.h"
#include "torch/conv2d/autograd.h"
#include "torch/conv_nd/conv_nd.h"
#include "torch/enable/call.h"
#include "torch/enable/chain.h"
#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

using Convolution = Stock<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef, SymIntArrayRef,
                                 SymIntArrayRef, bool, SymIntArrayRef, SymInt)>;

std::optional<Tensor> convolution(const Convolution& op, DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                                  const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                                  SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                                  SymInt groups) {
  const Tensor& b = tensor_of(bias);
  // What a depthwise one computes takes hardly longer than its input.
  const bool may_learn = learns(weight) && serves(Value::ours, input, weight) && weight.dim() > 1;
  const bool is_depthwise = may_learn && weight.sym_size(1) == 1 && groups != 1;
  const RecipePtr recipe = may_learn && !is_depthwise ? recipe_for_learning_layer(input, weight) : nullptr;
  if (recipe) {
    const auto stock = [&] {
      return op.stock(keys, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
    };
    return without_operands(stock, input, recipe, weight, nullptr);
  }
  const size_t axes = input.dim() - 2;
  const auto fits = [axes](SymIntArrayRef numbers) { return numbers.size() == 1 || numbers.size() == axes; };
  const bool gains = !weight.requires_grad() && weight.dim() == input.dim() && axes >= 1 && axes <= 3 && fits(stride) &&
                     fits(padding) && fits(dilation) && fits(output_padding) && !is_empty(input);
  if (!gains || !serves(Value::stock, input, weight, b)) return {};
  const auto compute = [&] {
    return op.forward(keys, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  };
  if (axes == 2 && !transposed) {
    return record_conv2d(input, weight, b, Geometry(stride, padding, dilation, groups, "auto"), compute);
  }
  const auto each_axis = [&](SymIntArrayRef numbers) {
    return numbers.size() == 1 ? std::vector<SymInt>(axes, numbers[0]) : numbers.vec();
  };
  return record_convolution(
      input, weight, b,
      {each_axis(stride), each_axis(padding), each_axis(dilation), transposed, each_axis(output_padding), groups},
      compute);
}

StandIn<convolution> of_convolution("convolution");

}  // namespace
}  // namespace freezekit::enable
