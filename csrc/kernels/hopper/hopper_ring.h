// What the Hopper kernels share: a ring of stages that one thread fills by bulk tensor copies and two warpgroups multiply.
//
// `full[stage]` completes with the bytes of a stage, `empty[stage]` once all eight consuming warps have read it. A stage
// holds kRows rows of A and kColumns of B, each 128 bytes long, under the 128-byte swizzle (core/shared_tile.h): K-major
// operands are stored row by row, MN-major ones in panels of 64 rows or columns, 64 values of the reduction deep.
#pragma once

#include "core/shared_tile.h"
#include "kernels/families.h"
#include "kernels/gemm_sm80/finish_fragment.h"
#include "kernels/hopper/tensor_map.h"

namespace freezekit {

constexpr int kHopperThreads = 384;
constexpr int kHopperConsumerWarps = 8;
constexpr int kHopperRingBytes = 192 * 1024;
// Registers per thread, of 65536: (40 + 2 * 232) * 128.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kPanel = kHopperWgradStep;  // rows of 128 bytes
constexpr int kPanelBytes = kPanel * static_cast<int>(kTileRow);

template <class T, int kColumnsOfTile>
struct HopperTile {
  static constexpr int kRows = kHopperRows, kColumns = kColumnsOfTile;
  static constexpr int kValues = kTileRow / sizeof(T);  // in a row
  static constexpr int kABytes = kRows * kTileRow;
  static constexpr int kStageBytes = kABytes + kColumns * kTileRow;
  static constexpr int kStages = kHopperRingBytes / kStageBytes;
  static_assert(kTileRow == kHopperStepBytes && kStages <= kMostHopperStages);
  // Up to 1024 bytes are lost to begin at a swizzle atom.
  static constexpr int kSharedBytes = kSwizzleAtom + kStages * kStageBytes + kHopperConsumerWarps * kPatchBytes;
};

// A place in the ring, and the parity of its barriers' phase.
template <int kStages>
struct RingCursor {
  int32_t stage = 0;
  uint32_t parity = 0;

  FK_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <class Tile>
struct HopperRing {
  unsigned char* stages;
  uint64_t *full, *empty;

  FK_DEVICE unsigned char* stage(int32_t i) const { return stages + i * Tile::kStageBytes; }
  FK_DEVICE float* patch(int32_t warp) const {
    return reinterpret_cast<float*>(stage(Tile::kStages) + warp * kPatchBytes);
  }

  // Once the stage at the cursor has been read, has it expect `bytes`; the barrier that copies into it complete on.
  FK_DEVICE uint64_t* refill(const RingCursor<Tile::kStages>& cursor, uint32_t bytes) const {
    ptx::mbarrier_wait(&empty[cursor.stage], cursor.parity ^ 1);  // the first round finds all stages empty
    ptx::mbarrier_arrive_expect(&full[cursor.stage], bytes);
    return &full[cursor.stage];
  }
};

// By all threads of the block.
template <class Tile>
FK_DEVICE HopperRing<Tile> make_ring(unsigned char* shared, uint64_t* full, uint64_t* empty) {
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kHopperConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are made
  return {shared + (-ptx::shared_address(shared) & (kSwizzleAtom - 1)), full, empty};
}

// acc += the products of `k_tiles` stages, for this warpgroup's 64 rows.
template <class T, bool kMnMajor, class Tile>
FK_DEVICE void multiply_stages(float (&acc)[Tile::kColumns / 2], int32_t k_tiles, int32_t warpgroup, int32_t lane,
                               const HopperRing<Tile>& ring, RingCursor<Tile::kStages>& cursor) {
  constexpr int kSteps = kTileRow / kWgmmaDepthBytes;
  static_assert(!kMnMajor || kPanel == 16 * kSteps, "a panel is as deep as its rows are long");
  uint64_t* previous = nullptr;
  for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::mbarrier_wait(&ring.full[cursor.stage], cursor.parity);
    const uint32_t stage = ptx::shared_address(ring.stage(cursor.stage));
    const uint32_t a = stage + static_cast<uint32_t>(warpgroup * kPanelBytes), b = stage + Tile::kABytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kMnMajor) {
        ptx::wgmma<T, true, true>(acc, mn_major_descriptor(a, kPanelBytes, step),
                                  mn_major_descriptor(b, kPanelBytes, step));
      } else {
        ptx::wgmma<T, false, false>(acc, k_major_descriptor(a, step), k_major_descriptor(b, step));
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the k-tile before this one has been read
    if (previous && lane == 0) ptx::mbarrier_arrive(previous);
    previous = &ring.empty[cursor.stage];
    cursor.advance();
  }
  ptx::wgmma_wait<0>();
  if (previous && lane == 0) ptx::mbarrier_arrive(previous);
}

// Calls f(block, fragment) for each 16 x 32 fragment of a warp's accumulators, from column 32 * block on, until it
// returns false.
template <int kCount, class F>
FK_DEVICE void for_each_fragment(const float (&acc)[kCount], const F& f) {
#pragma unroll
  for (int block = 0; block < kCount / 16; ++block) {
    float fragment[kFragmentColumns / 8][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) fragment[i / 4][i % 4] = acc[16 * block + i];
    if (!f(block, fragment)) break;
  }
}

}  // namespace freezekit
