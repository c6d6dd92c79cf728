// Launches the Hopper family: on addresses that tensor maps take, else the family of sm_80, which computes the same.
#include "core/gather.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

// A build without code for sm_90a must not launch the empty kernels that it holds instead.
Status check_build() {
#if defined(__CUDACC__) && !defined(FREEZEKIT_SM90A)
  set_last_error("this build has no code for sm_90a; FREEZEKIT_CUDA_ARCHS must name 90a");
  return Status::launch_failed;
#else
  return Status::success;
#endif
}

}  // namespace

Status launch_hopper_gemm(Operator op, int config, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors,
                          const Epilogue& epilogue, void* workspace, Stream stream) {
  const bool dgrad = op == Operator::dgrad;
  const void* const in = dgrad ? tensors.y : tensors.x;
  if (!is_aligned_16(in) || !is_aligned_16(dgrad ? workspace : tensors.filter)) {
    return launch_implicit_gemm(op, kImplicitGemmElements, p, dtype, tensors, epilogue, workspace, stream);
  }
  if (!hopper_takes(op, p, dtype)) return Status::invalid_argument;
  Status status = check_build();
  if (status != Status::success) return status;
  const void* filter = nullptr;
  status = prepare_filter(op, p, dtype, tensors, workspace, stream, &filter);
  if (status != Status::success) return status;
  void* const out = dgrad ? tensors.x : tensors.y;
  const Gather g = make_gather(op, p);
  switch (dtype) {
    case DType::bf16:
      return launch_hopper_gemm_bf16(config, g, in, filter, out, epilogue, stream);
    case DType::f16:
      return launch_hopper_gemm_f16(config, g, in, filter, out, epilogue, stream);
    case DType::f32:
      return launch_hopper_gemm_tf32(config, g, in, filter, out, epilogue, stream);
    default:
      return Status::unsupported;
  }
}

Status launch_hopper_wgrad(int config, int split_k, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors,
                           void* workspace, Stream stream) {
  // A tensor without elements has no map.
  if (p.n == 0 || !is_aligned_16(tensors.x) || !is_aligned_16(tensors.y)) {
    return launch_wgrad_gemm(kWgradGemmSmallest, split_k, p, dtype, tensors, workspace, stream);
  }
  if (!hopper_takes(Operator::wgrad, p, dtype) || split_k < 1 || split_k > kMaxGridYZ ||
      (split_k > 1 && !is_aligned_16(workspace))) {
    return Status::invalid_argument;
  }
  Status status = check_build();
  if (status != Status::success) return status;
  status = launch_hopper_wgrad_kernel(config, dtype, {p, split_k, tensors, workspace, stream});
  if (status != Status::success || split_k == 1) return status;
  return launch_ordered_reduce(workspace, tensors.filter, p.filter_numel(), split_k, dtype, stream);
}

}  // namespace freezekit
