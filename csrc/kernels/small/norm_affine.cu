// scale[k] = gamma[k] / sqrt(var[k] + eps);  shift[k] = beta[k] + (bias[k] - mean[k]) * scale[k]
//
// What a batch norm with fixed statistics does to channel k, made anew for every call: K threads, in fp64.
#include <cmath>

#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = kChannelsAtOnce;  // a vector has few: then a proof meets several blocks

FK_DEVICE double load_double(const ChannelVector& v, int64_t k, double otherwise) {
  if (!v.data) return otherwise;
  switch (v.dtype) {
    case DType::f64:
      return load_global(static_cast<const double*>(v.data) + k);
    case DType::f16:
      return cast<float>(load_global(static_cast<const f16*>(v.data) + k));
    case DType::bf16:
      return cast<float>(load_global(static_cast<const bf16*>(v.data) + k));
    default:
      return load_global(static_cast<const float*>(v.data) + k);
  }
}

template <class Wide>
__global__ void __launch_bounds__(kThreads)
    norm_affine_kernel(const FixedNorm norm, int64_t channels, Wide* __restrict__ scale, Wide* __restrict__ shift) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= channels) return;
  const double s = load_double(norm.gamma, k, 1) / sqrt(load_double(norm.var, k, 1) + norm.eps);
  store_global(scale + k, static_cast<Wide>(s));
  if (!shift) return;
  const double moved = load_double(norm.bias, k, 0) - load_double(norm.mean, k, 0);
  store_global(shift + k, static_cast<Wide>(load_double(norm.beta, k, 0) + moved * s));
}

template <class Wide>
Status launch(const FixedNorm& norm, int64_t channels, void* scale, void* shift, Stream stream) {
  const int64_t blocks = ceil_div(channels, kThreads);
  if (blocks > kMaxGridX) return Status::invalid_argument;
  return FK_LAUNCH(norm_affine_kernel<Wide>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, norm,
                   channels, static_cast<Wide*>(scale), static_cast<Wide*>(shift));
}

}  // namespace

Status launch_norm_affine(const FixedNorm& norm, int64_t channels, DType dtype, void* scale, void* shift,
                          Stream stream) {
  if (channels == 0) return Status::success;
  if (channels < 0 || !norm.var.data || !scale) return Status::invalid_argument;
  return dtype == DType::f64 ? launch<double>(norm, channels, scale, shift, stream)
                             : launch<float>(norm, channels, scale, shift, stream);
}

}  // namespace freezekit
