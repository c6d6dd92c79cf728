// Launches the implicit GEMM of a dtype; for dgrad it first makes W'.
#include "core/gather.h"
#include "kernels/families.h"

namespace freezekit {
namespace {

// The filter as KRSC, which is what a kernel's caller gives, into W' in the workspace.
Status transpose_filter(const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors, void* out, Stream stream) {
  FilterTransform transform;
  transform.from = transform.to = dtype;
  transform.transposed = true;
  transform.scale = tensors.filter_scale;
  transform.stride_c = 1;
  transform.stride_s = p.c_per_group();
  transform.stride_r = p.s * transform.stride_s;
  transform.stride_k = p.r * transform.stride_r;
  return launch_filter_transform(p, transform, tensors.filter, out, stream);
}

}  // namespace

Status prepare_filter(Operator op, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors, void* workspace,
                      Stream stream, const void** filter) {
  *filter = op == Operator::dgrad ? workspace : tensors.filter;
  if (op != Operator::dgrad) return Status::success;
  return transpose_filter(p, dtype, tensors, workspace, stream);
}

Status launch_implicit_gemm(Operator op, int config, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors,
                            const Epilogue& epilogue, void* workspace, Stream stream) {
  const bool dgrad = op == Operator::dgrad;
  const void* filter = nullptr;
  const Status status = prepare_filter(op, p, dtype, tensors, workspace, stream, &filter);
  if (status != Status::success) return status;
  const void* const in = dgrad ? tensors.y : tensors.x;
  void* const out = dgrad ? tensors.x : tensors.y;
  const Gather g = make_gather(op, p);
  switch (dtype) {
    case DType::bf16:
      return launch_implicit_gemm_bf16(config, g, in, filter, out, epilogue, stream);
    case DType::f16:
      return launch_implicit_gemm_f16(config, g, in, filter, out, epilogue, stream);
    case DType::f32:
      return launch_implicit_gemm_tf32(config, g, in, filter, out, epilogue, stream);
    default:
      return Status::unsupported;
  }
}

}  // namespace freezekit
