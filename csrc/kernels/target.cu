// What the current device and stream are.
#include "kernels/api.h"
#include "kernels/device.h"

namespace freezekit {

Status current_target(Target* target) {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&target->sm_count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    set_last_error(cudaGetErrorString(cudaGetLastError()));
    return Status::launch_failed;
  }
  target->sm = major * 10 + minor;
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};  // ascending; newer devices run the PTX of the first
  target->has_code = target->sm * 10 >= architectures[0];
#else
  target->sm = 80;
  target->sm_count = 4;  // small, so that split and persistent grids are exercised by small problems
#endif
  return Status::success;
}

bool is_capturing([[maybe_unused]] Stream stream) {
#ifdef __CUDACC__
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // A stream that cannot be asked is treated as captured: callers then allocate nothing that outlives the call.
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // as in launch()
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
#else
  return false;
#endif
}

CaptureMode exchange_capture_mode(CaptureMode mode) {
#ifdef __CUDACC__
  static_assert(static_cast<int>(CaptureMode::global) == cudaStreamCaptureModeGlobal);
  static_assert(static_cast<int>(CaptureMode::of_thread) == cudaStreamCaptureModeThreadLocal);
  static_assert(static_cast<int>(CaptureMode::relaxed) == cudaStreamCaptureModeRelaxed);
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  if (cudaThreadExchangeStreamCaptureMode(&exchanged) == cudaSuccess) return static_cast<CaptureMode>(exchanged);
  static_cast<void>(cudaGetLastError());  // as in launch()
#else
  static_cast<void>(mode);
#endif
  return CaptureMode::global;
}

}  // namespace freezekit
