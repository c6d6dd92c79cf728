// Max pooling's operators: what they check, what computes them, and the way into the dispatcher. Autograd is in
// autograd.cpp.
#include "torch/max_pool2d/max_pool2d.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Pool.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include "torch/backends/native_layers.h"
#include "torch/backends/route.h"
#include "torch/common/checks.h"
#include "torch/common/unseen.h"
#include "torch/max_pool2d/steps.h"

namespace freezekit {
namespace {

// What computes a problem; throws where the backend demands kernels that do not take it.
Computer computer_of(Op op, const MaxPool& m, const Tensor& values, const PoolGeometry& g) {
  const Computer computer = route_step(op, g.backend, values).computer;
  if (computer == Computer::kernels && !fits_int32(m)) {
    if (!is_own(g.backend)) return Computer::aten;
    refuse(to_string(op), g.backend, "an image of it, or a window, has more than 2^30 places");
  }
  return computer;
}

// (N, C, P, Q), by torch's own checks, whose messages are torch's.
std::array<int64_t, 4> output_size(const Tensor& input, const PoolGeometry& g, at::MemoryFormat format) {
  const auto extent = [&](size_t i) {
    return at::native::pooling_output_shape<int64_t>(input.size(2 + i), g.kernel_size[i], g.padding[i], g.stride[i],
                                                     g.dilation[i], g.ceil_mode);
  };
  const int64_t p = extent(0), q = extent(1);
  at::native::pool2d_shape_check(input, g.kernel_size[0], g.kernel_size[1], g.stride[0], g.stride[1], g.padding[0],
                                 g.padding[1], g.dilation[0], g.dilation[1], input.size(1), input.size(2),
                                 input.size(3), p, q, format);
  return {input.size(0), input.size(1), p, q};
}

// The same for sizes that are symbols, with strides. torch computes it in Python, which loads a lot.
Tensor output_like(const Tensor& input, const PoolGeometry& g) {
  const Tensor shape =
      at::empty_strided_symint(input.sym_sizes(), input.sym_strides(), input.options().device(at::kMeta));
  return std::get<0>(at::max_pool2d_with_indices(shape, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode));
}

void check_input(const Tensor& input) {
  TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions (N, C, H, W), got ", input.dim(), ": ",
              input.sym_sizes());
  check_floating(input, "input");
}

void check_taps(const Tensor& values, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_input(values);
  TORCH_CHECK(input_size.size() == 4, "input_size must have 4 numbers (N, C, H, W), got ", input_size);
  TORCH_CHECK(taps.scalar_type() == g.tap_type(), "taps must have dtype ", g.tap_type(), ", got ", taps.scalar_type());
  TORCH_CHECK(taps.device() == values.device(), "taps are on ", taps.device(), ", the other tensor on ",
              values.device());
  TORCH_CHECK(taps.dim() == 4 && taps.sym_size(0) == input_size[0] && taps.sym_size(1) == input_size[1],
              "taps must have size (N, C, P, Q) with N and C of ", input_size, ", got ", taps.sym_sizes());
}

std::tuple<Tensor, Tensor> taps_kernel(const Tensor& input, const PoolGeometry& g) {
  check_input(input);
  const at::AutoDispatchBelowADInplaceOrView below;
  // For all: tensors of size 1 suggest another than their neighbours.
  const auto format = input.suggest_memory_format();
  const auto size = output_size(input, g, format);
  const MaxPool m = g.problem(input.sizes(), size, format);
  const Computer computer = computer_of(Op::max_pool2d, m, input, g);
  if (!has_kernel(computer)) {
    auto [y, indices] = at::max_pool2d_with_indices(input, g.kernel_size, g.stride, g.padding, g.dilation, g.ceil_mode);
    return {y, max_pool::taps_of_indices(indices, input.sym_sizes(), g).to(g.tap_type())};
  }
  const SymIntArrayRef sizes = c10::fromIntArrayRefSlow(size);
  const Tensor y = empty_beside(input, sizes, format, input.scalar_type());
  const Tensor taps = empty_beside(input, sizes, format, g.tap_type());
  if (y.numel() == 0) return {y, taps};
  if (computer == Computer::cpu) {
    max_pool::forward_cpu(m, input.contiguous(format), y, taps);
  } else {
    native::max_pool(m, input.contiguous(format), y, taps);
  }
  return {y, taps};
}

Tensor scatter_kernel(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_taps(grad_output, taps, input_size, g);
  TORCH_CHECK(grad_output.sizes() == taps.sizes(), "grad_output must have the size of taps, ", taps.sizes(), ", got ",
              grad_output.sizes());
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto format = taps.suggest_memory_format();
  const auto size = C10_AS_INTARRAYREF_SLOW(input_size);
  const MaxPool m = g.problem(size, taps.sizes(), format);
  const Computer computer = computer_of(Op::max_pool2d_scatter, m, grad_output, g);
  if (!has_kernel(computer)) {
    return max_pool::scatter_by_aten(grad_output, taps, input_size, g).contiguous(format);
  }
  const Tensor dx = empty_beside(grad_output, input_size, format, grad_output.scalar_type());
  if (computer == Computer::kernels) {
    native::max_pool_scatter(m, grad_output.contiguous(format), taps.contiguous(format), dx);
  } else if (dx.zero_().numel() > 0 && taps.numel() > 0) {
    max_pool::scatter_cpu(m, grad_output.contiguous(format), taps.contiguous(format), dx);
  }
  return dx;
}

Tensor gather_kernel(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_taps(input, taps, input_size, g);
  TORCH_CHECK(input.sym_sizes() == input_size, "input must have size ", input_size, ", got ", input.sizes());
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto format = taps.suggest_memory_format();
  const MaxPool m = g.problem(input.sizes(), taps.sizes(), format);
  const Computer computer = computer_of(Op::max_pool2d_gather, m, input, g);
  if (!has_kernel(computer)) return max_pool::gather_by_aten(input, taps, g).contiguous(format);
  const Tensor y = empty_beside(input, taps.sym_sizes(), format, input.scalar_type());
  if (y.numel() == 0) return y;
  if (computer == Computer::cpu) {
    max_pool::gather_cpu(m, input.contiguous(format), taps.contiguous(format), y);
  } else {
    native::max_pool_gather(m, input.contiguous(format), taps.contiguous(format), y);
  }
  return y;
}

std::tuple<Tensor, Tensor> taps_meta(const Tensor& input, const PoolGeometry& g) {
  check_input(input);
  const Tensor y = output_like(input, g);
  return {y, at::empty_like(y, y.options().dtype(g.tap_type()))};
}

Tensor scatter_meta(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_taps(grad_output, taps, input_size, g);
  return at::empty_symint(input_size, grad_output.options(), taps.suggest_memory_format());
}

Tensor gather_meta(const Tensor& input, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry& g) {
  check_taps(input, taps, input_size, g);
  return at::empty_symint(taps.sym_sizes(), input.options(), taps.suggest_memory_format());
}

}  // namespace

PoolGeometry PoolGeometry::of_rows(SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding,
                                   SymIntArrayRef dilation, bool ceil_mode, std::string_view backend) {
  const auto after = [](int64_t first, SymIntArrayRef number) { return SizeVector{first, number.front()}; };
  return PoolGeometry(after(1, kernel_size), after(1, stride.empty() ? kernel_size : stride), after(0, padding),
                      after(1, dilation), ceil_mode, backend);
}

MaxPool PoolGeometry::problem(IntArrayRef input_size, IntArrayRef output_size, at::MemoryFormat format) const {
  const Pooling window = {input_size[2], input_size[3], output_size[2], output_size[3], kernel_size[0], kernel_size[1],
                          stride[0],     stride[1],     padding[0],     padding[1],     dilation[0],    dilation[1]};
  return {window, input_size[0], input_size[1], format == at::MemoryFormat::ChannelsLast,
          static_cast<int>(c10::elementSize(tap_type()))};
}

std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& input, const PoolGeometry& g) {
  if (reaches_kernel(input)) return taps_kernel(input, g);
  static const PoolPairOperator op("freezekit::max_pool2d_taps");
  return op(input, g);
}

Tensor max_pool2d_scatter(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                          const PoolGeometry& g) {
  if (reaches_kernel(grad_output, taps)) return scatter_kernel(grad_output, taps, input_size, g);
  static const TapMapOperator op("freezekit::max_pool2d_scatter");
  return op(grad_output, taps, input_size, g);
}

Tensor max_pool2d_gather(const Tensor& input, const Tensor& taps, const PoolGeometry& g) {
  static const TapMapOperator op("freezekit::max_pool2d_gather");
  return op(input, taps, input.sym_sizes(), g);
}

TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string settings =
      "SymInt[2] kernel_size, SymInt[2] stride=[], SymInt[2] padding=0, SymInt[2] dilation=1, bool ceil_mode=False, *, "
      "str backend=\"auto\") -> ";
  m.def(("max_pool2d(Tensor input, " + settings + "Tensor").c_str(), tags);
  m.def(("max_pool2d_with_indices(Tensor input, " + settings + "(Tensor, Tensor)").c_str(), tags);
  m.def(("max_pool2d_taps(Tensor input, " + settings + "(Tensor, Tensor)").c_str(), tags);
  m.def(("max_pool2d_scatter(Tensor grad_output, Tensor taps, SymInt[] input_size, " + settings + "Tensor").c_str(),
        tags);
  m.def(("max_pool2d_gather(Tensor input, Tensor taps, SymInt[] input_size, " + settings + "Tensor").c_str(), tags);
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d_taps", PoolPairOperator::kernel<taps_kernel>);
  m.impl("max_pool2d_scatter", TapMapOperator::kernel<scatter_kernel>);
  m.impl("max_pool2d_gather", TapMapOperator::kernel<gather_kernel>);
}
TORCH_LIBRARY_IMPL(freezekit, Meta, m) {
  m.impl("max_pool2d_taps", PoolPairOperator::kernel<taps_meta>);
  m.impl("max_pool2d_scatter", TapMapOperator::kernel<scatter_meta>);
  m.impl("max_pool2d_gather", TapMapOperator::kernel<gather_meta>);
}

}  // namespace freezekit
