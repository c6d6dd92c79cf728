#include "kernels/hopper/hopper_gemm_launch.h"

namespace freezekit {

Status launch_hopper_gemm_tf32(int config, const Gather& g, const void* in, const void* filter, void* out,
                               const Epilogue& epilogue, Stream stream) {
  return launch_hopper_gemm_of<float>(config, g, DType::f32, in, filter, out, epilogue, stream);
}

}  // namespace freezekit
