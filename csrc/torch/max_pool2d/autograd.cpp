// Autograd of max pooling: scatter and gather by the same taps are each other's derivative.
//
//   max_pool2d(input, ...)               torch's value; its node keeps taps where torch keeps input and int64 indices
//   max_pool2d_with_indices(input, ...)  the same, and torch's indices, which only the caller keeps
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include "torch/autograd/formula.h"
#include "torch/backends/proof.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/layout.h"
#include "torch/max_pool2d/max_pool2d.h"
#include "torch/max_pool2d/steps.h"

namespace freezekit {
namespace {

struct PoolFormula {
  PoolFormula() = default;
  PoolFormula(const PoolGeometry& geometry, SymIntArrayRef input_size)
      : geometry(geometry), input_size(input_size.begin(), input_size.end()) {}

  PoolGeometry geometry;
  SizeVector input_size;

  auto fields() { return std::tuple_cat(geometry.fields(), std::tie(geometry.backend, input_size)); }
};

// Of the gather: its gradient scatters.
struct ScatterGradient : PoolFormula {
  Link link() const { return {}; }
  variable_list gradients(const Tensor& grad, Kept taps, const Wanted& wanted) const {
    return {wanted[0] ? max_pool2d_scatter(grad, taps(0), input_size, geometry) : Tensor()};
  }
};

// Of the pooling itself: torch's backward operator reads the input. Of one tap in a channel the format says nothing.
struct PoolGradient : ScatterGradient {
  PoolGradient() = default;
  PoolGradient(const PoolGeometry& geometry, const Tensor& input)
      : ScatterGradient{PoolFormula(geometry, input.sym_sizes())}, format(input.suggest_memory_format()) {}

  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the input

  auto fields() { return std::tuple_cat(ScatterGradient::fields(), std::tie(format)); }
  Link link() const { return {Link::To::operands, /*count=*/1, /*zeros=*/true}; }
  variable_list gradients(const Tensor& grad, Kept taps, const Wanted& wanted) const {
    if (!wanted[0]) return {Tensor()};
    const Tensor dx = max_pool2d_scatter(grad, taps(0), input_size, geometry);
    return {proof::is_plain(grad) ? finish(dx, format) : dx};
  }
};

// Of the scatter: its gradient gathers.
struct GatherGradient : PoolFormula {
  Link link() const { return {}; }
  variable_list gradients(const Tensor& grad, Kept taps, const Wanted& wanted) const {
    return {wanted[0] ? max_pool2d_gather(grad, taps(0), geometry) : Tensor()};
  }
};

std::pair<Tensor, Tensor> pool_and_record(const Tensor& input, const PoolGeometry& g) {
  auto [result, taps] = below_autograd([&] { return max_pool2d_taps(input, g); });
  const auto node = formula_node("FreezekitMaxPool2dBackward", PoolGradient(g, input), input);
  return {with_history(std::move(result), node, taps), taps};
}

Tensor pool_aten(const Tensor& input, const PoolGeometry& g) {
  return at::max_pool2d(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
}

std::tuple<Tensor, Tensor> indices_aten(const Tensor& input, const PoolGeometry& g) {
  return at::max_pool2d_with_indices(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
}

// Taps as torch's indices h * W + w.
Tensor indices_of(const Tensor& taps, const Tensor& input, const PoolGeometry& g) {
  return max_pool::indices_of_taps(taps, input.sym_sizes(), g).first;
}

// Torch refuses an input that is not a batch of images, unless kernels are demanded: then the step below does.
bool is_left_to_torch(const Tensor& input, const PoolGeometry& g) {
  return route(Op::max_pool2d, g.backend, input).computer == Computer::formula ||
         (input.dim() != 4 && !is_own(g.backend));
}

// Without autograd: in inference mode, and below other transforms.
Tensor pool_plain(const Tensor& input, const PoolGeometry& g) {
  return is_own(g.backend) ? std::get<0>(max_pool2d_taps(input, g)) : pool_aten(input, g);
}

std::tuple<Tensor, Tensor> indices_plain(const Tensor& input, const PoolGeometry& g) {
  if (!is_own(g.backend)) return indices_aten(input, g);
  const auto [result, taps] = max_pool2d_taps(input, g);
  return {result, indices_of(taps, input, g)};
}

Tensor scatter_entry(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  if (route(Op::max_pool2d_scatter, g.backend, grad_output).computer == Computer::formula) {
    return max_pool::scatter_by_aten(grad_output, taps, input_size, g);
  }
  const auto node =
      formula_node("FreezekitMaxPool2dScatterBackward", GatherGradient{PoolFormula(g, input_size)}, grad_output);
  if (node) node->keep(taps);
  return recorded(node, [&] { return max_pool2d_scatter(grad_output, taps, input_size, g); });
}

Tensor gather_entry(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  if (route(Op::max_pool2d_gather, g.backend, input).computer == Computer::formula) {
    return max_pool::gather_by_aten(input, taps, g);
  }
  const auto node =
      formula_node("FreezekitMaxPool2dGatherBackward", ScatterGradient{PoolFormula(g, input_size)}, input);
  if (node) node->keep(taps);
  return recorded(node, [&] { return max_pool2d_gather(input, taps, g); });
}

void register_entries(torch::Library& m) {
  m.impl("max_pool2d", PoolOperator::kernel<record_max_pool2d>);
  m.impl("max_pool2d_with_indices", PoolPairOperator::kernel<record_max_pool2d_with_indices>);
  m.impl("max_pool2d_scatter", TapMapOperator::kernel<scatter_entry>);
  m.impl("max_pool2d_gather", TapMapOperator::kernel<gather_entry>);
}

}  // namespace

Tensor record_max_pool2d(const Tensor& input, const PoolGeometry& g) {
  return is_left_to_torch(input, g) ? pool_aten(input, g) : pool_and_record(input, g).first;
}

Tensor record_max_pool1d(const Tensor& input, const PoolGeometry& g) {
  return record_max_pool2d(input.unsqueeze(-2), g).squeeze(-2);
}

bool makes_indices(const Tensor& input, Backend backend) {
  return is_own(backend) || !choices::candidate_on(input.device().type());
}

std::tuple<Tensor, Tensor> record_max_pool2d_with_indices(const Tensor& input, const PoolGeometry& g) {
  if (!makes_indices(input, g.backend) || is_left_to_torch(input, g)) return indices_aten(input, g);
  const auto [result, taps] = pool_and_record(input, g);
  const Tensor indices = indices_of(taps, input, g);
  return {result, proof::is_plain(indices) ? finish(indices, input.suggest_memory_format()) : indices};
}

TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d", PoolOperator::kernel<pool_plain>);
  m.impl("max_pool2d_with_indices", PoolPairOperator::kernel<indices_plain>);
}
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { register_entries(m); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { register_entries(m); }

}  // namespace freezekit
