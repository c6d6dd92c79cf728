// Batch norm by given statistics and with a frozen weight keeps nothing of the input's size; layer and group norm keep
// nothing where the bias alone learns.
#include "torch/norm/norm.h"

#include <ATen/core/Tensor.h>

#include "torch/enable/call.h"
#include "torch/enable/chain.h"
#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Result, class Weight>
using BatchNorm = Stock<Result(const Tensor&, Weight, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, bool, double, double)>;
using FixedBatchNorm = Stock<Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                   const Tensor&, double, double)>;
using LayerNorm = Stock<Three(const Tensor&, SymIntArrayRef, const OptionalTensor&, const OptionalTensor&, double)>;
using GroupNorm =
    Stock<Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, SymInt, SymInt, SymInt, int64_t, double)>;

// `rest`: what else torch's operator takes, behind the statistics.
template <class Result, class Op, class Weight, class Statistic, class... Rest>
std::optional<Result> batch_norm_by(const Op& op, DispatchKeySet keys, bool training, double eps, const Tensor& input,
                                    const Weight& weight, const OptionalTensor& bias, const Statistic& running_mean,
                                    const Statistic& running_var, Rest... rest) {
  const Tensor &w = tensor_of(weight), &b = tensor_of(bias);
  const Tensor &mean = tensor_of(running_mean), &var = tensor_of(running_var);
  const bool gains =
      !training && mean.defined() && var.defined() && input.dim() >= 2 && !learns(w) && !learns(mean) && !learns(var);
  if (!gains || !serves(Value::stock, input, w, b, mean, var)) {
    if (!training) return {};
    auto results = op.stock(keys, input, weight, bias, running_mean, running_var, rest...);
    note_norm(std::get<0>(results), b, eps);
    return results;
  }
  auto results = op.forward(keys, input, weight, bias, running_mean, running_var, rest...);
  torch::autograd::set_history(std::get<0>(results), batch_norm_node(input, w, b, var, eps));
  return results;
}

template <class Result, class Weight>
std::optional<Result> batch_norm(const BatchNorm<Result, Weight>& op, DispatchKeySet keys, const Tensor& input,
                                 Weight weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, bool training, double momentum, double eps) {
  return batch_norm_by<Result>(op, keys, training, eps, input, weight, bias, running_mean, running_var, training,
                               momentum, eps);
}

// What torch.compile makes of batch norm in eval mode.
std::optional<Three> fixed_batch_norm(const FixedBatchNorm& op, DispatchKeySet keys, const Tensor& input,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      const Tensor& running_mean, const Tensor& running_var, double momentum,
                                      double eps) {
  return batch_norm_by<Three>(op, keys, /*training=*/false, eps, input, weight, bias, running_mean, running_var,
                              momentum, eps);
}

bool serves_bias_alone(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return is_for_bias_alone(input, weight, bias) && serves(Value::stock, input, weight, bias);
}

std::optional<Three> layer_norm(const LayerNorm& op, DispatchKeySet keys, const Tensor& input, SymIntArrayRef shape,
                                const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Tensor& b = tensor_of(bias);
  if (!serves_bias_alone(input, tensor_of(weight), b)) {
    auto results = op.stock(keys, input, shape, weight, bias, eps);
    note_norm(std::get<0>(results), b, eps);
    return results;
  }
  auto results = op.forward(keys, input, shape, weight, bias, eps);
  torch::autograd::set_history(std::get<0>(results), layer_norm_bias_node(b));
  return results;
}

std::optional<Three> group_norm(const GroupNorm& op, DispatchKeySet keys, const Tensor& input,
                                const OptionalTensor& weight, const OptionalTensor& bias, SymInt n, SymInt c, SymInt hw,
                                int64_t groups, double eps) {
  const Tensor& b = tensor_of(bias);
  const bool is_batch = input.dim() >= 2 && input.sym_size(0) == n && input.sym_size(1) == c;
  if (!is_batch) return {};
  if (!serves_bias_alone(input, tensor_of(weight), b)) {
    auto results = op.stock(keys, input, weight, bias, n, c, hw, groups, eps);
    note_norm(std::get<0>(results), b, eps);
    return results;
  }
  auto results = op.forward(keys, input, weight, bias, n, c, hw, groups, eps);
  // Torch lets all three require a gradient here, and gives the bias none of the statistics'.
  auto& [y, mean, rstd] = results;
  torch::autograd::set_history(torch::autograd::variable_list{y, mean, rstd}, group_norm_bias_node(b));
  return results;
}

StandIn<batch_norm<Three, const OptionalTensor&>> of_batch_norm("native_batch_norm");
StandIn<batch_norm<Four, const Tensor&>> of_cudnn_batch_norm("cudnn_batch_norm");
StandIn<fixed_batch_norm> of_fixed_batch_norm("_native_batch_norm_legit_no_training");
StandIn<layer_norm> of_layer_norm("native_layer_norm");
StandIn<group_norm> of_group_norm("native_group_norm");

}  // namespace
}  // namespace freezekit::enable
