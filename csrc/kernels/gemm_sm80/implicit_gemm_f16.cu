#include "kernels/gemm_sm80/implicit_gemm_launch.h"

namespace freezekit {

template Status launch_implicit_gemm_of<f16>(const Conv2dLaunch&, const void* filter);

}  // namespace freezekit
