#include "torch/backends/native.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>

#include "torch/common/checks.h"
#include "torch/common/constants.h"
#include "torch/backends/launch_log.h"
#include "torch/common/layout.h"
#include "torch/common/route.h"

namespace freezekit::native {

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: return std::nullopt;
  }
}

Stream stream_of(const Tensor& on) {
  if (!on.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device()).native_handle();
}

void check_status(Status status, const char* kernel, const KernelLibrary& library) {
  TORCH_CHECK(status == Status::success, "freezekit kernel ", kernel, " failed: ", to_string(status),
              library.last_error());
}

namespace {

std::atomic<bool> hopper_allowed{false};
thread_local bool without_hopper = false;

Tensor dense_channels_last(const Tensor& tensor) { return tensor.contiguous(at::MemoryFormat::ChannelsLast); }

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
  const Selection selection = select(op, problem, dtype, target_on(library, backend));
  if (selection.family == Family::none) refuse(name_of(op), backend, selection.reason);
  return {op, problem, backend, library, dtype, selection};
}

// Undefined for none.
Tensor workspace_of(size_t bytes, const Tensor& on) {
  return bytes == 0 ? Tensor() : at::empty({static_cast<int64_t>(bytes)}, on.options().dtype(at::kByte));
}

void launch(const Choice& choice, const Tensor& on, const Conv2dTensors& tensors, const Epilogue& epilogue) {
  const Tensor workspace = workspace_of(choice.selection.workspace_bytes, on);
  check_status(choice.library.table->conv2d(choice.op, choice.selection, choice.problem, choice.dtype, tensors,
                                            epilogue, workspace.defined() ? workspace.mutable_data_ptr() : nullptr,
                                            stream_of(on)),
               choice.selection.kernel, choice.library);
  if (!launch_log::is_enabled()) return;
  const Conv2dProblem& p = choice.problem;
  launch_log::add({name_of(choice.op), choice.selection.kernel, choice.backend,
                   {{"input_size", {p.n, p.c, p.h, p.w}}, {"weight_size", {p.k, p.c_per_group(), p.r, p.s}}}});
}

// W', the filter as dgrad's GEMM reads it, of a weight that was declared constant: made once. Undefined for others,
// whose W' the kernel makes in its workspace, and for kernels that read the filter as it is.
Tensor kept_transposed_filter(const Choice& choice, const Tensor& weight) {
  const bool reads_one = choice.selection.family == Family::implicit_gemm || choice.selection.family == Family::hopper;
  if (!reads_one || !constants::is_declared(weight)) return {};
  const int64_t detail = choice.problem.groups * 8 + static_cast<int64_t>(choice.backend);
  // By value, since the cache keeps it to make W' again.
  const auto make = [groups = choice.problem.groups, backend = choice.backend](const Tensor& source) {
    const Tensor made = at::empty({source.numel()}, source.options());
    FilterTransform transform;
    transform.transposed = true;
    transform_filter(transform, source, groups, made, backend);
    return made;
  };
  return constants::derived(weight, {"transposed filter", detail}, make);
}

// Kernels write NHWC; the caller gets the layout that ATen would give.
Tensor empty_output(IntArrayRef size, const Tensor& like) {
  return at::empty(size, like.options(), at::MemoryFormat::ChannelsLast);
}

}  // namespace

Target target_on(const KernelLibrary& library, Backend backend) {
  Target target;
  TORCH_CHECK(library.table->target(&target) == Status::success,
              "freezekit cannot read the current device's properties", library.last_error());
  const auto& context = at::globalContext();
  target.allow_tf32 = context.allowTF32CuDNN(at::Float32Op::CONV);
  target.deterministic = context.deterministicAlgorithms() || context.deterministicCuDNN();
  target.hopper = hopper_allowed && !without_hopper;
  if (target.hopper && backend == Backend::emulated) target.sm = 90;
  return target;
}

bool supports(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend backend) {
  const auto dtype = dtype_of(on.scalar_type());
  return dtype && on.layout() == at::kStrided &&
         select(op, problem, *dtype, target_on(kernel_library(backend), backend)).family != Family::none;
}

bool is_capturing(const Tensor& on) {
  return on.is_cuda() && kernel_library(Backend::native).table->capturing(stream_of(on));
}

DType kernel_dtype(const Tensor& tensor) {
  const auto dtype = dtype_of(tensor.scalar_type());
  TORCH_CHECK(dtype, "freezekit's kernels take float32, float64, float16 and bfloat16, got ", tensor.scalar_type());
  return *dtype;
}

void transform_filter(FilterTransform transform, const Tensor& filter, int64_t groups, const Tensor& out,
                      Backend backend) {
  route_step(Op::frozen_conv2d, backend, filter);  // refuses what cannot be
  const c10::DeviceGuard guard(filter.device());
  const KernelLibrary& library = kernel_library(backend);
  Conv2dProblem problem;
  problem.k = filter.size(0), problem.c = filter.size(1) * groups, problem.r = filter.size(2);
  problem.s = filter.size(3), problem.groups = groups;
  transform.from = kernel_dtype(filter), transform.to = kernel_dtype(out);
  transform.stride_k = filter.stride(0), transform.stride_c = filter.stride(1);
  transform.stride_r = filter.stride(2), transform.stride_s = filter.stride(3);
  check_status(library.table->filter_transform(problem, transform, filter.const_data_ptr(), out.mutable_data_ptr(),
                                               stream_of(filter)),
               "filter_transform", library);
  if (!launch_log::is_enabled()) return;
  launch_log::add({"filter_transform", transform.fold ? "filter_transform_fold" : "filter_transform", backend,
                   {{"weight_size", filter.sizes().vec()}}});
}

Tensor conv2d_epilogue(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight, const Finish& finish,
                       const Geometry& g) {
  const c10::DeviceGuard guard(input.device());
  const Tensor x = dense_channels_last(input), w = dense_channels_last(weight);
  const Tensor b = finish.bias.defined() ? finish.bias.contiguous() : Tensor();
  const Tensor r = finish.residual.defined() ? dense_channels_last(finish.residual) : Tensor();
  const Tensor y = empty_output({problem.n, problem.k, problem.p, problem.q}, input);
  Epilogue epilogue;
  if (b.defined()) epilogue.bias = b.const_data_ptr(), epilogue.wide_bias = b.scalar_type() != x.scalar_type();
  if (r.defined()) epilogue.residual = r.const_data_ptr();
  epilogue.relu = finish.relu, epilogue.relu_end = finish.relu_end;
  if (finish.mask_out.defined()) epilogue.mask_out = static_cast<uint32_t*>(finish.mask_out.mutable_data_ptr());
  launch(choose(Operator::fprop, problem, input, g.backend), input,
         {const_cast<void*>(x.const_data_ptr()), const_cast<void*>(w.const_data_ptr()), y.mutable_data_ptr()},
         epilogue);
  return y;
}

Tensor dgrad_epilogue(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& weight,
                      const Tensor& residual, const Tensor& mask_in, const Geometry& g) {
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor dy = dense_channels_last(grad_output), w = dense_channels_last(weight);
  const Tensor r = residual.defined() ? dense_channels_last(residual) : Tensor();
  const Tensor m = mask_in.defined() ? mask_in.contiguous() : Tensor();
  const Tensor dx = empty_output({problem.n, problem.c, problem.h, problem.w}, grad_output);
  Epilogue epilogue;
  if (r.defined()) epilogue.residual = r.const_data_ptr();
  if (m.defined()) epilogue.mask_in = static_cast<const uint32_t*>(m.const_data_ptr());
  const Choice choice = choose(Operator::dgrad, problem, grad_output, g.backend);
  const Tensor transposed = kept_transposed_filter(choice, weight);
  launch(choice, grad_output,
         {dx.mutable_data_ptr(), const_cast<void*>(w.const_data_ptr()), const_cast<void*>(dy.const_data_ptr()),
          transposed.defined() ? transposed.const_data_ptr() : nullptr},
         epilogue);
  return dx;
}

Tensor conv2d(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& bias, const Geometry& g) {
  Finish finish;
  finish.bias = bias.value_or(Tensor());
  return conv2d_epilogue(problem, input, weight, finish, g).contiguous(layout_of(input, weight));
}

Tensor dgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& weight, const Geometry& g) {
  return dgrad_epilogue(problem, grad_output, weight, {}, {}, g).contiguous(layout_of(grad_output, weight));
}

Tensor wgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& input, const Geometry& g) {
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor dy = dense_channels_last(grad_output), x = dense_channels_last(input);
  const Tensor dw = empty_output({problem.k, problem.c_per_group(), problem.r, problem.s}, grad_output);
  launch(choose(Operator::wgrad, problem, grad_output, g.backend), grad_output,
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

WithoutHopper::WithoutHopper() : outer_(without_hopper) { without_hopper = true; }
WithoutHopper::~WithoutHopper() { without_hopper = outer_; }

}  // namespace freezekit::native
