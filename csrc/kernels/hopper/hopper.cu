// Launches the Hopper family: on addresses that tensor maps take, else the family of sm_80, which computes the same.
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

Status launch_hopper_gemm(const Conv2dLaunch& launch) {
  const bool dgrad = launch.op == Operator::dgrad;
  if (!is_aligned_16(launch.in()) || !is_aligned_16(dgrad ? launch.workspace : launch.tensors.filter)) {
    Conv2dLaunch other = launch;
    other.selection.config = kImplicitGemmElements;
    return launch_implicit_gemm(other);
  }
  if (!hopper_takes(launch.op, launch.problem, launch.dtype)) return Status::invalid_argument;
  Status status = check_build();
  if (status != Status::success) return status;
  const void* filter = nullptr;
  status = prepare_filter(launch, &filter);
  if (status != Status::success) return status;
  return dispatch_short_dtype(
      launch.dtype, [&](auto tag) { return launch_hopper_gemm_of<typename decltype(tag)::type>(launch, filter); });
}

Status launch_hopper_wgrad(const Conv2dLaunch& launch) {
  // A tensor without elements has no map.
  if (launch.problem.n == 0 || !is_aligned_16(launch.tensors.x) || !is_aligned_16(launch.tensors.y)) {
    Conv2dLaunch other = launch;
    other.selection.config = kWgradGemmSmallest;
    return launch_wgrad_gemm(other);
  }
  if (!hopper_takes(Operator::wgrad, launch.problem, launch.dtype) ||
      (launch.selection.split_k > 1 && !is_aligned_16(launch.workspace))) {
    return Status::invalid_argument;
  }
  const Status status = check_build();
  return status == Status::success ? launch_hopper_wgrad_kernel(launch) : status;
}

}  // namespace freezekit
