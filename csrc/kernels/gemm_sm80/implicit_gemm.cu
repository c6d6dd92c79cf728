// Launches the implicit GEMM of a dtype; for dgrad it first makes W'.
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {

// The filter is KRSC, which is what a kernel's caller gives.
Status prepare_filter(const Conv2dLaunch& launch, const void** filter) {
  const Conv2dProblem& p = launch.problem;
  const Conv2dTensors& tensors = launch.tensors;
  *filter = launch.op == Operator::dgrad ? launch.workspace : tensors.filter;
  if (launch.op != Operator::dgrad) return Status::success;
  FilterTransform transform;
  transform.from = transform.to = launch.dtype;
  transform.transposed = true;
  transform.scale = tensors.filter_scale;
  transform.stride_c = 1;
  transform.stride_s = p.c_per_group();
  transform.stride_r = p.s * transform.stride_s;
  transform.stride_k = p.r * transform.stride_r;
  return launch_filter_transform(p, transform, tensors.filter, launch.workspace, launch.stream);
}

Status launch_implicit_gemm(const Conv2dLaunch& launch) {
  const void* filter = nullptr;
  const Status status = prepare_filter(launch, &filter);
  if (status != Status::success) return status;
  return dispatch_short_dtype(
      launch.dtype, [&](auto tag) { return launch_implicit_gemm_of<typename decltype(tag)::type>(launch, filter); });
}

}  // namespace freezekit
