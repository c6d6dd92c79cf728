#include "torch/native.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>

#include "torch/checks.h"
#include "torch/kernel_library.h"
#include "torch/layout.h"

namespace freezekit::native {
namespace {

std::optional<DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: return std::nullopt;
  }
}

const char* name_of(Operator op) {
  static const char* const names[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"};
  return names[static_cast<int>(op)];
}

std::mutex log_mutex;
bool log_enabled = false;
std::vector<LaunchRecord> log_records;

void log_launch(const LaunchRecord& record) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  if (log_enabled) log_records.push_back(record);
}

Target target_on(const KernelLibrary& library) {
  Target target;
  TORCH_CHECK(library.table->target(&target) == Status::success,
              "freezekit cannot read the current device's properties", library.last_error());
  const auto& context = at::globalContext();
  target.allow_tf32 = context.allowTF32CuDNN();
  target.deterministic = context.deterministicAlgorithms() || context.deterministicCuDNN();
  return target;
}

Tensor dense_channels_last(const Tensor& tensor) { return tensor.contiguous(at::MemoryFormat::ChannelsLast); }

// Everything of a launch that does not depend on the operator: device, stream, choice, workspace, the launch itself.
void launch(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend backend, const Conv2dTensors& tensors,
            const Epilogue& epilogue) {
  const KernelLibrary& library = kernel_library(backend);
  const Target target = target_on(library);
  const DType dtype = *dtype_of(on);
  const Selection selection = select(op, problem, dtype, target);
  TORCH_CHECK(selection.family != Family::none, "no freezekit kernel for ", name_of(op), ": ", selection.reason,
              "; backend='aten' computes it");
  Tensor workspace;
  if (selection.workspace_bytes > 0) {
    workspace = at::empty({static_cast<int64_t>(selection.workspace_bytes)}, on.options().dtype(at::kByte));
  }
  Stream stream = nullptr;
  if (on.is_cuda()) {
    stream = c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device()).native_handle();
  }
  const Status status =
      library.table->conv2d(op, selection, problem, dtype, tensors, epilogue,
                            workspace.defined() ? workspace.mutable_data_ptr() : nullptr, stream);
  TORCH_CHECK(status == Status::success, "freezekit kernel ", selection.kernel, " for ", name_of(op), " failed: ",
              to_string(status), library.last_error());
  log_launch({op, selection.kernel, backend, problem});
}

// Kernels write NHWC; the caller gets the layout that ATen would give.
Tensor empty_output(IntArrayRef size, const Tensor& like) {
  return at::empty(size, like.options(), at::MemoryFormat::ChannelsLast);
}

}  // namespace

bool runs(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend backend) {
  // ATen's libraries stay the automatic choice until a measurement on a GPU says otherwise.
  if (backend == Backend::automatic || backend == Backend::aten) return false;
  if (backend == Backend::native) {
    TORCH_CHECK(on.is_cuda(), "backend='native' needs CUDA tensors, got one on ", on.device(),
                "; on a CPU backend='emulated' runs the same kernels, slowly");
  } else {
    TORCH_CHECK(on.is_cpu(), "backend='emulated' needs CPU tensors, got one on ", on.device());
  }
  TORCH_CHECK(on.layout() == at::kStrided, "backend='", to_string(backend), "' takes strided tensors, got layout ",
              on.layout());
  TORCH_CHECK(dtype_of(on), "backend='", to_string(backend), "' takes float32, float64, float16 and bfloat16, got ",
              on.scalar_type());
  kernel_library(backend);
  return true;
}

Tensor conv2d_epilogue(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight, const Tensor& bias,
                       const Tensor& residual, bool relu, const Tensor& mask_out, const Geometry& g) {
  const c10::DeviceGuard guard(input.device());
  const Tensor x = dense_channels_last(input), w = dense_channels_last(weight);
  const Tensor b = bias.defined() ? bias.contiguous() : Tensor();
  const Tensor r = residual.defined() ? dense_channels_last(residual) : Tensor();
  const Tensor y = empty_output({problem.n, problem.k, problem.p, problem.q}, input);
  Epilogue epilogue;
  if (b.defined()) epilogue.bias = b.const_data_ptr();
  if (r.defined()) epilogue.residual = r.const_data_ptr();
  epilogue.relu = relu;
  if (mask_out.defined()) epilogue.mask_out = static_cast<uint32_t*>(mask_out.mutable_data_ptr());
  launch(Operator::fprop, problem, input, g.backend,
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
  launch(Operator::dgrad, problem, grad_output, g.backend,
         {dx.mutable_data_ptr(), const_cast<void*>(w.const_data_ptr()), const_cast<void*>(dy.const_data_ptr())},
         epilogue);
  return dx;
}

Tensor conv2d(const Conv2dProblem& problem, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& bias, const Geometry& g) {
  return conv2d_epilogue(problem, input, weight, bias.value_or(Tensor()), {}, false, {}, g)
      .contiguous(layout_of(input, weight));
}

Tensor dgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& weight, const Geometry& g) {
  return dgrad_epilogue(problem, grad_output, weight, {}, {}, g).contiguous(layout_of(grad_output, weight));
}

Tensor wgrad(const Conv2dProblem& problem, const Tensor& grad_output, const Tensor& input, const Geometry& g) {
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor dy = dense_channels_last(grad_output), x = dense_channels_last(input);
  const Tensor dw = empty_output({problem.k, problem.c_per_group(), problem.r, problem.s}, grad_output);
  launch(Operator::wgrad, problem, grad_output, g.backend,
         {const_cast<void*>(x.const_data_ptr()), dw.mutable_data_ptr(), const_cast<void*>(dy.const_data_ptr())}, {});
  return dw.contiguous(layout_of(grad_output, input));
}

void set_launch_log(bool enabled) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  log_enabled = enabled;
  if (!enabled) log_records.clear();
}

std::vector<LaunchRecord> take_launch_log() {
  const std::lock_guard<std::mutex> lock(log_mutex);
  return std::exchange(log_records, {});
}

}  // namespace freezekit::native
