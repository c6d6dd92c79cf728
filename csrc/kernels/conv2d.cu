// From a Selection to the launcher of its family, and the table through which another library reaches the kernels.
#include "core/gather.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

int64_t output_numel(Operator op, const Conv2dProblem& p) {
  return op == Operator::fprop ? p.y_numel() : op == Operator::dgrad ? p.x_numel() : p.filter_numel();
}

// A pointer may be null where its tensor is empty: wgrad of an empty batch reads nothing and writes zeros.
bool pointers_are_there(Operator op, const Conv2dProblem& p, const Conv2dTensors& t) {
  return t.filter && (t.x || (op == Operator::wgrad && p.x_numel() == 0)) &&
         (t.y || (op == Operator::wgrad && p.y_numel() == 0));
}

bool epilogue_is_valid(Operator op, const Epilogue& e) {
  const bool any = e.scale || e.bias || e.residual || e.relu || e.mask_out || e.mask_in;
  return op == Operator::wgrad ? !any : (!e.mask_out || e.relu) && e.relu_end > 0;
}

// Tiled where the selection says so and the addresses allow it, else generic: both compute the same.
Status launch_depthwise(const Conv2dLaunch& launch) {
  const Conv2dTensors& t = launch.tensors;
  const Epilogue& e = launch.epilogue;
  const bool tiled = launch.selection.config == kDepthwiseTiled && is_aligned_16(t.x) && is_aligned_16(t.y) &&
                     is_aligned_16(e.scale) && is_aligned_16(e.bias) && is_aligned_16(e.residual);
  if (launch.op == Operator::wgrad) {
    return tiled ? launch_depthwise_wgrad(launch) : launch_depthwise_generic_wgrad(launch);
  }
  return tiled ? launch_depthwise_gather(launch) : launch_depthwise_generic_gather(launch);
}

Status launch_family(const Conv2dLaunch& launch) {
  const bool wgrad = launch.op == Operator::wgrad;
  switch (launch.selection.family) {
    case Family::direct:
      return wgrad ? launch_direct_wgrad(launch) : launch_direct_gather(launch);
    case Family::implicit_gemm:
      return wgrad ? launch_wgrad_gemm(launch) : launch_implicit_gemm(launch);
    case Family::hopper:
      return wgrad ? launch_hopper_wgrad(launch) : launch_hopper_gemm(launch);
    case Family::depthwise:
      return launch_depthwise(launch);
    case Family::none:
      break;
  }
  return Status::unsupported;
}

}  // namespace

Status launch_conv2d(Operator op, const Selection& selection, const Conv2dProblem& p, DType dtype,
                     const Conv2dTensors& tensors, const Epilogue& epilogue, void* workspace, Stream stream) {
  if (output_numel(op, p) == 0) return Status::success;
  if (selection.family == Family::none) return Status::unsupported;
  if (!fits_int32(p) || !pointers_are_there(op, p, tensors) || !epilogue_is_valid(op, epilogue) ||
      (selection.workspace_bytes > 0 && !workspace)) {
    return Status::invalid_argument;
  }
  const bool makes_filter = selection.family == Family::implicit_gemm || selection.family == Family::hopper;
  if (tensors.filter_scale && !(op == Operator::dgrad && makes_filter)) return Status::invalid_argument;
  const int split_k = selection.split_k;
  const bool has_slices = op == Operator::wgrad && (split_k > 1 || selection.family == Family::depthwise);
  if (op == Operator::wgrad && (split_k < 1 || split_k > kMaxGridYZ)) return Status::invalid_argument;
  if (has_slices && !workspace) return Status::invalid_argument;
  const Status status = launch_family({op, selection, p, dtype, tensors, epilogue, workspace, stream});
  if (status != Status::success || !has_slices) return status;
  return launch_ordered_reduce(workspace, tensors.filter, p.filter_numel(), split_k, dtype, stream);
}

}  // namespace freezekit

#ifndef __CUDACC__
// A library of its own may be of an older tree than what loads it.
extern "C" FK_EXPORT size_t freezekit_kernel_table_bytes() { return sizeof(freezekit::KernelTable); }
#endif

extern "C" FK_EXPORT const freezekit::KernelTable* freezekit_kernel_table() {
  using namespace freezekit;
  static const KernelTable table = {
      launch_conv2d,          bias_grad_workspace, launch_bias_grad,  launch_filter_transform, launch_norm_affine,
      launch_activation,      launch_gate,         launch_pack_bytes, launch_max_pool,         launch_max_pool_scatter,
      launch_max_pool_gather, current_target,      is_capturing,      exchange_capture_mode};
  return &table;
}
