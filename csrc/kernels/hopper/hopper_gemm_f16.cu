#include "kernels/hopper/hopper_gemm_launch.h"

namespace freezekit {

Status launch_hopper_gemm_f16(int config, const Gather& g, const void* in, const void* filter, void* out,
                              const Epilogue& epilogue, Stream stream) {
  return launch_hopper_gemm_of<f16>(config, g, DType::f16, in, filter, out, epilogue, stream);
}

}  // namespace freezekit
