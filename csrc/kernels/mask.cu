// Zeroes mask words before kernels or bits into them.
#include "core/mask.h"

#include <algorithm>

#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) zero_words_kernel(uint32_t* words, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    store_global(words + i, uint32_t{0});
  }
}

}  // namespace

Status launch_mask_prepare(uint32_t* mask, int64_t numel, bool runs_own_bytes, Stream stream) {
  const int64_t words = mask_words(numel);
  // Where runs own bytes, only bits past the end of the tensor are left: those of an incomplete last word.
  const int64_t first = runs_own_bytes ? words - (numel % 32 != 0) : 0;
  if (first == words) return Status::success;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(words - first, kThreads), 65535));
  return FK_LAUNCH(zero_words_kernel, dim3(blocks), dim3(kThreads), 0, stream, mask + first, words - first);
}

}  // namespace freezekit
