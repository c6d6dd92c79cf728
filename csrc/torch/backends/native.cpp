#include "torch/backends/native.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <utility>

#include "torch/backends/launch_log.h"
#include "torch/backends/route.h"
#include "torch/common/layout.h"

namespace freezekit::native {

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      return std::nullopt;
  }
}

Stream stream_of(const Tensor& on) {
  if (!on.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device()).native_handle();
}

void check_status(Status status, const char* kernel, const KernelLibrary& library) {
  if (status == Status::success) return;
  const std::string cause = status == Status::launch_failed ? library.last_error() : "";
  // A launch may load code or enlarge stacks. What an allocator of torch's says then, others know how to handle.
  TORCH_CHECK_WITH(OutOfMemoryError, cause != ": out of memory", "freezekit kernel ", kernel, " found no memory");
  TORCH_CHECK(false, "freezekit kernel ", kernel, " failed: ", to_string(status), cause);
}

namespace {

std::atomic<bool> hopper_allowed{false};
thread_local std::optional<bool> hopper_decided;
thread_local const Selection* selected = nullptr;

// As a launch reads it. Memory that begins in the middle of 16 bytes is copied: other code of the kernels would read it,
// which `auto` has not held against anything.
Tensor aligned(const Tensor& dense) {
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

Tensor dense_channels_last(const Tensor& tensor) { return aligned(tensor.contiguous(at::MemoryFormat::ChannelsLast)); }

// A launch decided on: everything that does not depend on the operator's tensors.
struct Choice {
  Operator op;
  const Conv2dProblem& problem;
  Backend backend;
  const KernelLibrary& library;
  DType dtype;
  Selection selection;
};

Choice choose(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend backend) {
  const KernelLibrary& library = kernel_library(backend);
  const DType dtype = kernel_dtype(on);
  const Selection selection = selected ? *selected : select(op, problem, dtype, target_on(library, backend));
  if (selection.family == Family::none) refuse(name_of(op), backend, selection.reason);
  return {op, problem, backend, library, dtype, selection};
}

// Undefined for none.
Tensor workspace_of(size_t bytes, const Tensor& on) {
  return bytes == 0 ? Tensor() : at::empty({static_cast<int64_t>(bytes)}, on.options().dtype(at::kByte));
}

// On `images` of the problem's.
void launch(const Choice& choice, int64_t images, const Tensor& on, const Conv2dTensors& tensors,
            const Epilogue& epilogue) {
  Conv2dProblem p = choice.problem;
  p.n = images;
  const Tensor workspace = workspace_of(choice.selection.workspace_bytes, on);
  check_status(
      choice.library.table->conv2d(choice.op, choice.selection, p, choice.dtype, tensors, epilogue,
                                   workspace.defined() ? workspace.mutable_data_ptr() : nullptr, stream_of(on)),
      choice.selection.kernel, choice.library);
  if (!launch_log::is_enabled()) return;
  launch_log::add({name_of(choice.op),
                   choice.selection.kernel,
                   choice.backend,
                   {{"input_size", {p.n, p.c, p.h, p.w}}, {"weight_size", {p.k, p.c_per_group(), p.r, p.s}}}});
}

// Kernels write NHWC; the caller gets the layout that ATen would give.
Tensor empty_output(IntArrayRef size, const Tensor& like) {
  return at::empty(size, like.options(), at::MemoryFormat::ChannelsLast);
}

bool is_in_nhwc(const Tensor& tensor) { return tensor.is_contiguous(at::MemoryFormat::ChannelsLast); }

// How many of a batch's images are computed at once. Under a mask all, since its bits are one row of words for the batch.
int64_t images_at_once(int64_t n, std::initializer_list<std::pair<int64_t, bool>> bytes_and_whether_copied,
                       bool has_mask) {
  int64_t copied = 0, unit = 1;
  for (const auto& [bytes, is_copied] : bytes_and_whether_copied) {
    if (is_copied) copied += bytes;
    if (!is_copied && n > 0 && bytes / n % 16 != 0) unit = 8;  // kernels are to begin at multiples of 16 bytes
  }
  if (has_mask || copied <= kCopiedBytes) return n;
  const int64_t most = std::max<int64_t>(kCopiedBytes / ((copied + n - 1) / n), 1);
  const int64_t slices = (n + most - 1) / most, even = (n + slices - 1) / slices;
  return std::min(n, std::max(even / unit * unit, unit));
}

// A result of this size and format by compute(images, x, residual, y), which takes all of them in NHWC. Those that are in
// another order are copied, some images at a time, so that the copies of a large batch take little memory beside it.
template <class Compute>
Tensor by_images(IntArrayRef size, at::MemoryFormat format, const Tensor& x, const Tensor& residual, bool has_mask,
                 const Compute& compute) {
  const int64_t n = size[0], bytes = c10::multiply_integers(size) * x.element_size();
  const bool is_both = size[1] == 1 || size[2] * size[3] == 1;
  const bool turns = format != at::MemoryFormat::ChannelsLast && !is_both;
  const int64_t step = images_at_once(n,
                                      {{static_cast<int64_t>(x.nbytes()), !is_in_nhwc(x)},
                                       {residual.defined() ? bytes : 0, residual.defined() && !is_in_nhwc(residual)},
                                       {bytes, turns}},
                                      has_mask);
  const auto part = [&](const Tensor& tensor, int64_t first, int64_t images) {
    return tensor.defined() && images < n ? tensor.narrow(0, first, images) : tensor;
  };
  const auto computed = [&](int64_t first, int64_t images, const Tensor& y) {
    const Tensor r = residual.defined() ? dense_channels_last(part(residual, first, images)) : residual;
    compute(images, dense_channels_last(part(x, first, images)), r, y);
  };
  if (step == n) {
    const Tensor y = empty_output(size, x);
    computed(0, n, y);
    return finish(y, format);
  }
  const Tensor y = at::empty(size, x.options(), format);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t images = std::min(step, n - first);
    const Tensor to = part(y, first, images), made = turns ? empty_output(to.sizes(), to) : to;
    computed(first, images, made);
    if (turns) to.copy_(made);
  }
  return y;
}

// weight * scale[k] in the layout that kernels read.
Tensor scaled_filter(const Choice& choice, const Tensor& weight, const Tensor& scale) {
  const Tensor scaled = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
  FilterTransform transform;
  transform.from = transform.to = choice.dtype;
  transform.stride_k = weight.stride(0), transform.stride_c = weight.stride(1);
  transform.stride_r = weight.stride(2), transform.stride_s = weight.stride(3);
  transform.scale = scale.const_data_ptr();
  check_status(choice.library.table->filter_transform(choice.problem, transform, weight.const_data_ptr(),
                                                      scaled.mutable_data_ptr(), stream_of(weight)),
               "filter_transform", choice.library);
  if (launch_log::is_enabled()) {
    launch_log::add({"filter_transform", "filter_transform", choice.backend, {{"weight_size", weight.sizes().vec()}}});
  }
  return scaled;
}

}  // namespace

std::optional<Target> find_target(const KernelLibrary& library, Backend backend) {
  Target target;
  if (library.table->target(&target) != Status::success) return std::nullopt;
  const auto& context = at::globalContext();
  target.allow_tf32 = context.allowTF32CuDNN(at::Float32Op::CONV);
  target.deterministic = context.deterministicAlgorithms() || context.deterministicCuDNN();
  target.hopper = hopper_decided.value_or(hopper_allowed);
  if (target.hopper && backend == Backend::emulated) target.sm = 90;
  return target;
}

Target target_on(const KernelLibrary& library, Backend backend) {
  const auto target = find_target(library, backend);
  TORCH_CHECK(target, "freezekit cannot read the current device's properties", library.last_error());
  return *target;
}

bool is_capturing(const Tensor& on, Backend backend) { return kernel_library(backend).table->capturing(stream_of(on)); }

DType kernel_dtype(const Tensor& tensor) {
  const auto dtype = dtype_of(tensor.scalar_type());
  TORCH_CHECK(dtype, "freezekit's kernels take float32, float64, float16 and bfloat16, got ", tensor.scalar_type());
  return *dtype;
}

std::tuple<Tensor, Tensor> norm_affine(const FixedNormTensors& norm, const Tensor& bias, const Tensor& like,
                                       Backend backend) {
  const c10::DeviceGuard guard(like.device());
  const KernelLibrary& library = kernel_library(backend);
  const DType dtype = kernel_dtype(like);
  std::vector<Tensor> dense;  // as long as the kernel is launched
  const auto vector = [&](const Tensor& tensor) {
    if (!tensor.defined()) return ChannelVector();
    dense.push_back(tensor.contiguous());
    return ChannelVector{dense.back().const_data_ptr(), kernel_dtype(tensor)};
  };
  FixedNorm parts;
  parts.mean = vector(norm.mean), parts.var = vector(norm.var), parts.gamma = vector(norm.gamma);
  parts.beta = vector(norm.beta), parts.bias = vector(bias), parts.eps = norm.eps;
  const auto options = like.options().dtype(dtype == DType::f64 ? at::kDouble : at::kFloat);
  const int64_t channels = norm.var.size(0);
  const Tensor scale = at::empty({channels}, options), shift = at::empty({channels}, options);
  check_status(library.table->norm_affine(parts, channels, dtype, scale.mutable_data_ptr(), shift.mutable_data_ptr(),
                                          stream_of(like)),
               "norm_affine", library);
  if (launch_log::is_enabled()) launch_log::add({"norm_affine", "norm_affine", backend, {}});
  return {scale, shift};
}

Tensor conv2d_epilogue(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight, const Finish& finish,
                       const Geometry& g, at::MemoryFormat format) {
  const c10::DeviceGuard guard(input.device());
  const Choice choice = choose(Operator::fprop, problem, input, g.backend);
  const Tensor w = dense_channels_last(weight);
  const Tensor b = finish.bias.defined() ? aligned(finish.bias.contiguous()) : Tensor();
  Epilogue epilogue;
  if (finish.scale.defined()) epilogue.scale = finish.scale.const_data_ptr();
  if (b.defined()) epilogue.bias = b.const_data_ptr(), epilogue.wide_bias = b.scalar_type() != input.scalar_type();
  epilogue.relu = finish.relu, epilogue.relu_end = finish.relu_end;
  if (finish.mask_out.defined()) epilogue.mask_out = static_cast<uint32_t*>(finish.mask_out.mutable_data_ptr());
  return by_images(
      {problem.n, problem.k, problem.p, problem.q}, format, input, finish.residual, finish.mask_out.defined(),
      [&](int64_t images, const Tensor& x, const Tensor& r, const Tensor& y) {
        if (r.defined()) epilogue.residual = r.const_data_ptr();
        launch(choice, images, y,
               {const_cast<void*>(x.const_data_ptr()), const_cast<void*>(w.const_data_ptr()), y.mutable_data_ptr()},
               epilogue);
      });
}

Tensor dgrad_epilogue(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& weight,
                      const Tensor& scale, const Tensor& residual, const Tensor& mask_in, const Geometry& g,
                      at::MemoryFormat format) {
  const c10::DeviceGuard guard(grad_output.device());
  const Choice choice = choose(Operator::dgrad, problem, grad_output, g.backend);
  // Kernels on tensor cores make a filter of their own anyway, and multiply it there.
  const bool makes_filter =
      choice.selection.family == Family::implicit_gemm || choice.selection.family == Family::hopper;
  const Tensor w =
      scale.defined() && !makes_filter ? scaled_filter(choice, weight, scale) : dense_channels_last(weight);
  const Tensor m = mask_in.defined() ? mask_in.contiguous() : Tensor();
  Epilogue epilogue;
  if (m.defined()) epilogue.mask_in = static_cast<const uint32_t*>(m.const_data_ptr());
  return by_images(
      {problem.n, problem.c, problem.h, problem.w}, format, grad_output, residual, m.defined(),
      [&](int64_t images, const Tensor& dy, const Tensor& r, const Tensor& dx) {
        if (r.defined()) epilogue.residual = r.const_data_ptr();
        launch(choice, images, dx,
               {dx.mutable_data_ptr(), const_cast<void*>(w.const_data_ptr()), const_cast<void*>(dy.const_data_ptr()),
                scale.defined() && makes_filter ? scale.const_data_ptr() : nullptr},
               epilogue);
      });
}

Tensor conv2d(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& bias, const Geometry& g) {
  Finish finish;
  finish.bias = bias.value_or(Tensor());
  return conv2d_epilogue(problem, input, weight, finish, g, layout_of(input, weight));
}

Tensor dgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& weight, const Geometry& g) {
  return dgrad_epilogue(problem, grad_output, weight, {}, {}, {}, g, layout_of(grad_output, weight));
}

Tensor wgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& input, const Geometry& g) {
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor dy = dense_channels_last(grad_output), x = dense_channels_last(input);
  const Tensor dw = empty_output({problem.k, problem.c_per_group(), problem.r, problem.s}, grad_output);
  launch(choose(Operator::wgrad, problem, grad_output, g.backend), problem.n, grad_output,
         {const_cast<void*>(x.const_data_ptr()), dw.mutable_data_ptr(), const_cast<void*>(dy.const_data_ptr())}, {});
  return dw.contiguous(layout_of(grad_output, input));
}

Tensor bias_grad(const Tensor& grad_output, Backend backend) {
  const c10::DeviceGuard guard(grad_output.device());
  const KernelLibrary& library = kernel_library(backend);
  const DType dtype = kernel_dtype(grad_output);
  const Tensor dy = dense_channels_last(grad_output);
  const int64_t k = dy.size(1), rows = dy.size(0) * dy.size(2) * dy.size(3);
  const Tensor db = at::empty({k}, dy.options());
  const Tensor workspace = workspace_of(library.table->bias_grad_bytes(rows, k, dtype), dy);
  check_status(library.table->bias_grad(dy.const_data_ptr(), db.mutable_data_ptr(), rows, k, dtype,
                                        workspace.defined() ? workspace.mutable_data_ptr() : nullptr, stream_of(dy)),
               "bias_grad", library);
  if (launch_log::is_enabled()) {
    launch_log::add({"conv2d_bias_grad", "bias_grad", backend, {{"grad_output_size", dy.sizes().vec()}}});
  }
  return db;
}

void set_hopper(bool allowed) { hopper_allowed = allowed; }

HopperScope::HopperScope(bool allowed) : outer_(std::exchange(hopper_decided, allowed)) {}
HopperScope::~HopperScope() { hopper_decided = outer_; }

SelectionScope::SelectionScope(const Selection& selection) : outer_(std::exchange(selected, &selection)) {}
SelectionScope::~SelectionScope() { selected = outer_; }

}  // namespace freezekit::native
