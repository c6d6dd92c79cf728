#include "kernels/hopper/hopper_gemm_launch.h"

namespace freezekit {

template Status launch_hopper_gemm_of<f16>(const Conv2dLaunch&, const void* filter);

}  // namespace freezekit
