#include "kernels/gemm_sm80/implicit_gemm_launch.h"

namespace freezekit {

Status launch_implicit_gemm_f16(int config, const Gather& g, const void* in, const void* filter, void* out,
                                const Epilogue& epilogue, Stream stream) {
  return launch_implicit_gemm_of<f16>(config, g, in, filter, out, epilogue, stream);
}

}  // namespace freezekit
