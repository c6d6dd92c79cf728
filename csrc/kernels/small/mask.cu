// Bit masks that an epilogue adds its bits to, element by element, to words that are zero.
#include <algorithm>

#include "core/mask.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;

dim3 grid_for(int64_t threads) {
  return dim3(static_cast<unsigned>(std::min(ceil_div(threads, kThreads), kMaxBlocks)));
}

FK_DEVICE int64_t first_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
FK_DEVICE int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * kThreads; }

__global__ void __launch_bounds__(kThreads) zero_words_kernel(uint32_t* words, int64_t count) {
  for (int64_t i = first_thread(); i < count; i += thread_count()) store_global(words + i, uint32_t{0});
}

}  // namespace

Status launch_mask_prepare(uint32_t* mask, int64_t numel, bool runs_own_bytes, Stream stream) {
  if (!mask) return Status::success;
  const int64_t words = mask_words(numel);
  // Where runs own bytes, only bits past the end of the tensor are left: those of an incomplete last word.
  const int64_t first = runs_own_bytes ? words - (numel % 32 != 0) : 0;
  if (first == words) return Status::success;
  return FK_LAUNCH(zero_words_kernel, grid_for(words - first), dim3(kThreads), 0, stream, mask + first, words - first);
}

}  // namespace freezekit
