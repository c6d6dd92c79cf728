// The mainloop of the sm_80 tensor-core kernels: a ring of k-tiles in shared memory, filled by cp.async while others are
// multiplied.
//
// k-tile i is in stage i % kStages. While one is multiplied the next kStages - 2 are on their way.
#pragma once

#include "kernels/ptx.h"

namespace freezekit {

// load(stage) starts the copies of the next k-tile; multiply(stage) uses a k-tile that has landed. All threads of the
// block call it; afterwards no copy is in flight, but other warps may still read the last stage.
template <int kStages, class Load, class Multiply>
FK_DEVICE void run_ring(int32_t tiles, const Load& load, const Multiply& multiply) {
#pragma unroll 1
  for (int32_t i = 0; i < kStages - 1; ++i) {
    if (i < tiles) load(i);
    ptx::cp_async_commit();  // empty groups too: the wait below counts groups
  }
  int32_t stage = 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the k-tile is there for all, and nobody reads the stage that is refilled next
    const int32_t refill = stage == 0 ? kStages - 1 : stage - 1;
    if (tile + kStages - 1 < tiles) load(refill);
    ptx::cp_async_commit();
    multiply(stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
}

}  // namespace freezekit
