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
Status launch_depthwise(Operator op, const Selection& selection, const Conv2dProblem& p, DType dtype,
                        const Conv2dTensors& tensors, const Epilogue& epilogue, void* workspace, Stream stream) {
  const bool tiled = selection.config == kDepthwiseTiled && is_aligned_16(tensors.x) && is_aligned_16(tensors.y) &&
                     is_aligned_16(epilogue.scale) && is_aligned_16(epilogue.bias) && is_aligned_16(epilogue.residual);
  if (op == Operator::wgrad) {
    return tiled ? launch_depthwise_wgrad(selection.split_k, p, dtype, tensors, workspace, stream)
                 : launch_depthwise_generic_wgrad(selection.split_k, p, dtype, tensors, workspace, stream);
  }
  const void* const in = op == Operator::fprop ? tensors.x : tensors.y;
  void* const out = op == Operator::fprop ? tensors.y : tensors.x;
  return tiled ? launch_depthwise_gather(op, p, dtype, in, tensors.filter, out, epilogue, stream)
               : launch_depthwise_generic_gather(op, p, dtype, in, tensors.filter, out, epilogue, stream);
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
  const bool fprop = op == Operator::fprop;
  const void* const in = fprop ? tensors.x : tensors.y;
  void* const out = fprop ? tensors.y : tensors.x;
  switch (selection.family) {
    case Family::direct:
      if (op == Operator::wgrad) {
        return launch_direct_wgrad(selection.config, selection.split_k, p, dtype, tensors, workspace, stream);
      }
      return launch_direct_gather(selection.config, make_gather(op, p), dtype, in, tensors.filter, out, epilogue,
                                  stream);
    case Family::implicit_gemm:
      if (op == Operator::wgrad) {
        return launch_wgrad_gemm(selection.config, selection.split_k, p, dtype, tensors, workspace, stream);
      }
      return launch_implicit_gemm(op, selection.config, p, dtype, tensors, epilogue, workspace, stream);
    case Family::hopper:
      if (op == Operator::wgrad) {
        return launch_hopper_wgrad(selection.config, selection.split_k, p, dtype, tensors, workspace, stream);
      }
      return launch_hopper_gemm(op, selection.config, p, dtype, tensors, epilogue, workspace, stream);
    case Family::depthwise:
      return launch_depthwise(op, selection, p, dtype, tensors, epilogue, workspace, stream);
    case Family::none:
      break;
  }
  return Status::unsupported;
}

}  // namespace freezekit

#ifndef __CUDACC__
// A library of its own may be of an older tree than what loads it.
extern "C" FK_EXPORT size_t freezekit_kernel_table_bytes() { return sizeof(freezekit::KernelTable); }
#endif

extern "C" FK_EXPORT const freezekit::KernelTable* freezekit_kernel_table() {
  static const freezekit::KernelTable table = {freezekit::launch_conv2d,
                                               freezekit::bias_grad_workspace,
                                               freezekit::launch_bias_grad,
                                               freezekit::launch_filter_transform,
                                               freezekit::launch_norm_affine,
                                               freezekit::launch_activation,
                                               freezekit::launch_gate,
                                               freezekit::launch_pack_bytes,
                                               freezekit::launch_max_pool,
                                               freezekit::launch_max_pool_scatter,
                                               freezekit::launch_max_pool_gather,
                                               freezekit::current_target,
                                               freezekit::is_capturing,
                                               freezekit::exchange_capture_mode};
  return &table;
}
