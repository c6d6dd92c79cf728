// PReLU with a frozen slope: y = x where x > 0, else slope * x.
//
//   prelu(input, weight)   torch's value; its node keeps one bit per element, and the slope, where torch keeps the input
//
// dx is dy where x > 0, else slope * dy. The gradient of a slope reads x: where the slope learns, the call is torch's own.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_prelu_kernel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/prelu.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/backends/route.h"
#include "torch/bits/gate.h"
#include "torch/bits/layers.h"
#include "torch/common/autocast.h"
#include "torch/common/layout.h"
#include "torch/common/shape_only.h"

namespace freezekit {
namespace {

using PreluOperator = Tensor(const Tensor& input, const Tensor& weight, std::string_view backend);

bool is_alike(const Tensor& slope, const Tensor& x) {
  return slope.scalar_type() == x.scalar_type() && slope.device() == x.device();
}

// Whether it can be read as a number without waiting for a device.
bool is_number(const Tensor& slope) { return slope.sym_numel() == 1 && is_plain_on_cpu(slope); }

double number_of(const Tensor& slope) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slope.scalar_type(), "freezekit::prelu",
                                         [&] { return static_cast<double>(*slope.const_data_ptr<scalar_t>()); });
}

struct PreluGradient {
  SizeVector stride;  // of bits
  Operand operand;
  Backend backend = Backend::automatic;

  auto fields() { return std::tie(stride, operand.stride, backend); }
  Link link() const { return {Link::To::operands, /*count=*/1, /*zeros=*/true}; }

  variable_list gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
    if (!wanted[0]) return {Tensor(), Tensor()};
    const Tensor bits = kept(0), slope = kept(1);
    const auto finished = [&](Tensor dx) -> variable_list {
      return {operand.finish(std::move(dx), grad, stride, slope), Tensor()};
    };
    if (is_number(slope)) return finished(gate(grad, bits, {stride, {1, number_of(slope)}, backend}));
    // In this order, and in place where nothing is recorded: two tensors of this size at a time, as in torch.
    Tensor dx = gate(grad.mul(slope), bits.bitwise_not(), {stride, {}, backend});
    if (const Tensor above = gate(grad, bits, {stride, {}, backend}); c10::GradMode::is_enabled()) {
      dx = dx.add(above);
    } else {
      dx.add_(above);
    }
    return finished(std::move(dx));
  }
};

// `weight` as it broadcasts against the input; undefined where torch has an error to give.
Tensor slope_of(const Tensor& input, const Tensor& weight) {
  if (weight.dim() > 1 || !is_alike(weight, input)) return {};
  const bool one = weight.sym_numel() == 1;
  if (!one && (input.dim() < 2 || weight.sym_numel() != input.sym_size(1))) return {};
  std::vector<c10::SymInt> size(input.dim(), 1);
  if (!one) size[1] = weight.sym_numel();
  return weight.view_symint(size);
}

// ATen's own check of a weight that is missing asks for a bug report.
void check_defined(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.defined(), "input must be a tensor, got an undefined one");
  TORCH_CHECK(weight.defined(), "weight must be a tensor, got an undefined one");
}

Tensor prelu_entry(const Tensor& input, const Tensor& weight, std::string_view backend) {
  return prelu(input, weight, parse_backend(backend));
}

// Without autograd: in inference mode, and below other transforms.
Tensor prelu_plain(const Tensor& input, const Tensor& weight, std::string_view backend) {
  check_defined(input, weight);
  return is_own(parse_backend(backend)) ? prelu_entry(input, weight, backend) : at::prelu(input, weight);
}

Tensor prelu_autocast(const Tensor& input, const Tensor& weight, std::string_view backend) {
  static const auto op = find_operator<PreluOperator>("freezekit::prelu");
  const Autocast cast(input);
  return op.call(cast(input), cast(weight), backend);
}

}  // namespace

Tensor prelu(const Tensor& input, const Tensor& weight, Backend backend) {
  check_defined(input, weight);
  const bool demanded = is_own(backend);
  if (demanded && torch::autograd::compute_requires_grad(weight)) {
    refuse("prelu", backend, "its slope learns, and the gradient of a slope reads the input");
  }
  // On a GPU a slope takes more passes than the activations that are proven there: `auto` leaves it to torch.
  const bool is_unproven = input.is_cuda() && backend == Backend::automatic;
  if ((!demanded && weight.requires_grad()) || is_unproven ||
      route(Op::activation, backend, input, weight).computer == Computer::formula) {
    return at::prelu(input, weight);
  }
  const Tensor slope = slope_of(input, weight);
  const bool records = torch::autograd::compute_requires_grad(input);
  return slope.defined() && (records || demanded) ? record_prelu(input, slope, backend) : at::prelu(input, weight);
}

bool is_slope_of(const Tensor& x, const Tensor& slope) {
  if (slope.dim() != x.dim() || !is_alike(slope, x)) return false;
  const auto numel = slope.sym_numel();
  return numel == 1 || (x.dim() > 1 && numel == x.sym_size(1) && slope.sym_size(1) == numel);
}

Tensor record_prelu(const Tensor& x, const Tensor& slope, Backend backend) {
  Tensor y, bits;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::tie(y, bits) = leaky_relu_bits(x, is_number(slope) ? number_of(slope) : 0, backend);
    if (!is_number(slope)) {
      y = at::_prelu_kernel(x, slope);
    } else if (is_plain_on_cpu(x) && x.is_non_overlapping_and_dense() && !restride(y, x.strides())) {
      y = at::empty_like(x);  // torch makes a prelu's result like its input, and here there are no elements to move
    }
  }
  const auto node =
      formula_node("FreezekitPReLUBackward", PreluGradient{dense_strides(x), Operand(x), backend}, x, slope);
  return with_history(std::move(y), node, bits, slope);
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def("prelu(Tensor input, Tensor weight, *, str backend=\"auto\") -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { m.impl("prelu", prelu_plain); }
TORCH_LIBRARY_IMPL(freezekit, Autograd, m) { m.impl("prelu", prelu_entry); }
TORCH_LIBRARY_IMPL(freezekit, FuncTorchBatched, m) { m.impl("prelu", prelu_entry); }
TORCH_LIBRARY_IMPL(freezekit, AutocastCPU, m) { m.impl("prelu", prelu_autocast); }
TORCH_LIBRARY_IMPL(freezekit, AutocastCUDA, m) { m.impl("prelu", prelu_autocast); }

}  // namespace freezekit
