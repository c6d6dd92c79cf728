// Bit masks of tensors in memory order, bit i of word j being element 32 * j + i.
//
//   pack:  mask bit = !(x <= 0)          apply:  out = mask bit ? x : 0
//
// A warp takes 32 neighbouring elements, hence one word; no alignment beyond the element's.
#include "core/mask.h"

#include <algorithm>

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_pack_kernel(const T* __restrict__ x, uint32_t* __restrict__ mask, int64_t numel) {
  const int64_t padded = (numel + 31) / 32 * 32;  // whole warps, so that all lanes of one meet at the ballot
  for (int64_t i = first_thread(); i < padded; i += thread_count()) {
    const bool keep = i < numel && !(cast<Accumulator<T>>(load_global(x + i)) <= 0);
    const uint32_t word = __ballot_sync(0xffffffffu, keep);
    if (i % 32 == 0) store_global(mask + i / 32, word);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_apply_kernel(const T* x, const uint32_t* __restrict__ mask, T* out, int64_t numel) {
  for (int64_t i = first_thread(); i < numel; i += thread_count()) {
    const bool keep = load_global(mask + i / 32) >> (i % 32) & 1;
    store_global(out + i, keep ? load_global(x + i) : cast<T>(0.0f));
  }
}

}  // namespace

Status launch_mask_prepare(uint32_t* mask, int64_t numel, bool runs_own_bytes, Stream stream) {
  const int64_t words = mask_words(numel);
  // Where runs own bytes, only bits past the end of the tensor are left: those of an incomplete last word.
  const int64_t first = runs_own_bytes ? words - (numel % 32 != 0) : 0;
  if (first == words) return Status::success;
  return FK_LAUNCH(zero_words_kernel, grid_for(words - first), dim3(kThreads), 0, stream, mask + first, words - first);
}

Status launch_mask_pack(const void* x, uint32_t* mask, int64_t numel, DType dtype, Stream stream) {
  if (numel == 0) return Status::success;
  if (numel < 0 || !x || !mask) return Status::invalid_argument;
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return FK_LAUNCH(mask_pack_kernel<T>, grid_for(numel), dim3(kThreads), 0, stream, static_cast<const T*>(x), mask,
                     numel);
  });
}

Status launch_mask_apply(const void* x, const uint32_t* mask, void* out, int64_t numel, DType dtype, Stream stream) {
  if (numel == 0) return Status::success;
  if (numel < 0 || !x || !mask || !out) return Status::invalid_argument;
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return FK_LAUNCH(mask_apply_kernel<T>, grid_for(numel), dim3(kThreads), 0, stream, static_cast<const T*>(x), mask,
                     static_cast<T*>(out), numel);
  });
}

}  // namespace freezekit
