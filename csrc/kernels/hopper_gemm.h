// fprop and dgrad on Hopper (sm_90a): the GEMM of implicit_gemm.h by wgmma, its operands brought by the tensor memory
// accelerator, so that no thread computes an address in the mainloop.
//
//   out[n, oh, ow, j] = epilogue(sum over taps (t, u) and channels c of in[n, ih, iw, c] * f[j, t, u, c])
//
//   GEMM        | index                  | fprop         | dgrad                      | brought by
//   row m       | output position        | n, p, q       | n and the h, w of the phase |
//   column j    | output channel         | k of a group  | c of a group               |
//   reduction l | tap and input channel  | r, s, c       | the phase's r, s and k     |
//   A[m][l]     | in                     | x, NHWC       | dy, NHWC                   | im2col copies (core/pixel_box.h)
//   B[l][j]     | f[j][t][u][c]          | filter, KRSC  | W', the filter as CRSK     | tiled copies of (c, tap, j)
//
// A k-tile is one tap and 128 bytes of channels: rows of both operands are K-major rows under the 128-byte swizzle
// (core/shared_tile.h). Channels beyond the last come as zeros, of both operands where there is one group.
//
// A block has three warpgroups: one thread of the first issues all copies into a ring of stages, two multiply, 64 rows
// each. `full[stage]` completes with the bytes of a stage, `empty[stage]` once all eight consuming warps have read it.
// Blocks are persistent and walk the output tiles by the size of the grid, so that copies for the next tile are under
// way while this one is finished. A phase of a strided dgrad without taps stores the epilogue of zero.
#pragma once

#include "core/shared_tile.h"
#include "kernels/families.h"
#include "kernels/finish_fragment.h"
#include "kernels/tensor_map.h"

namespace freezekit {

constexpr int kHopperThreads = 384;
constexpr int kHopperConsumerWarps = 8;
constexpr int kHopperRingBytes = 192 * 1024;
// Registers a thread, of 65536: (40 + 2 * 232) * 128.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <class T, int kColumnsOfTile>
struct HopperTile {
  static constexpr int kRows = kHopperRows, kColumns = kColumnsOfTile;
  static constexpr int kValues = kTileRow / sizeof(T);  // of a k-tile along the reduction
  static constexpr int kInBytes = kRows * kTileRow;
  static constexpr int kStageBytes = kInBytes + kColumns * kTileRow;
  static constexpr int kStages = kHopperRingBytes / kStageBytes;
  // Up to 1024 bytes are lost to begin at a swizzle atom.
  static constexpr int kSharedBytes = kSwizzleAtom + kStages * kStageBytes + kHopperConsumerWarps * kPatchBytes;
};

// The input's maps by the number of outputs of a phase along h and w; only in[0][0], a plain matrix, for a pointwise one.
struct HopperMaps {
  ptx::TensorMap in[2][2], filter;
};

// The output tiles: columns, then rows, groups, phases.
struct HopperGrid {
  PixelBoxes boxes;
  int32_t row_tiles = 0, column_tiles = 0, tiles = 0;
  int32_t pointwise = 0;

  // False: the phase is smaller than the largest and has no such tile.
  FK_DEVICE bool place(const Gather& g, int32_t tile, int32_t columns, FragmentPlace* at) const {
    int32_t rest = tile;
    at->column0 = rest % column_tiles * columns, rest /= column_tiles;
    at->row0 = rest % row_tiles * kHopperRows, rest /= row_tiles;
    at->group = rest % g.groups, rest /= g.groups;
    at->phase_w = rest % g.phases_w, at->phase_h = rest / g.phases_w;
    at->h = g.axis_h(at->phase_h), at->w = g.axis_w(at->phase_w);
    at->rows = g.batch * at->h.count * at->w.count;
    return at->row0 < at->rows;
  }
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
};

// Issues the copies of one output tile.
template <class Tile>
FK_DEVICE void produce_tile(const Gather& g, const HopperGrid& grid, const HopperMaps& maps, const FragmentPlace& at,
                            const HopperRing<Tile>& ring, RingCursor<Tile::kStages>& cursor) {
  const int32_t channel0 = at.group * g.in_c, filter_row = at.group * g.out_c + at.column0;
  const ptx::TensorMap* in = &maps.in[0][0];
  ptx::Im2colPosition pixel{channel0, 0, 0, 0};
  if (!grid.pointwise) {
    int32_t i, j;
    pixel.n = g.decode_row(at.row0, at.phase_h, at.phase_w, &i, &j);
    pixel.h = grid.boxes.h.pixel(i), pixel.w = grid.boxes.w.pixel(j);
    in = &maps.in[box_of_phase(at.phase_h, g.wider_h)][box_of_phase(at.phase_w, g.wider_w)];
  }
  for (int32_t t = 0; t < at.h.taps; ++t) {
    for (int32_t u = 0; u < at.w.taps; ++u) {
      const int32_t offset_h = grid.boxes.h.offset(at.h, t), offset_w = grid.boxes.w.offset(at.w, u);
      const int32_t r = at.h.filter_first + t * at.h.filter_step, s = at.w.filter_first + u * at.w.filter_step;
      for (int32_t c = 0; c < g.in_c; c += Tile::kValues) {
        uint64_t* const full = &ring.full[cursor.stage];
        unsigned char* const stage = ring.stage(cursor.stage);
        ptx::mbarrier_wait(&ring.empty[cursor.stage], cursor.parity ^ 1);  // the first round finds all stages empty
        ptx::mbarrier_arrive_expect(full, Tile::kStageBytes);
        if (grid.pointwise) {
          ptx::copy_tile(stage, in, full, channel0 + c, at.row0);
        } else {
          pixel.channel = channel0 + c;
          ptx::copy_im2col(stage, in, full, pixel, offset_w, offset_h);
        }
        ptx::copy_tile(stage + Tile::kInBytes, &maps.filter, full, c, r * g.w.taps + s, filter_row);
        cursor.advance();
      }
    }
  }
}

// acc += the products of one output tile, of this warpgroup's 64 rows.
template <class T, class Tile>
FK_DEVICE void consume_tile(float (&acc)[Tile::kColumns / 2], int32_t k_tiles, int32_t warpgroup, int32_t lane,
                            const HopperRing<Tile>& ring, RingCursor<Tile::kStages>& cursor) {
  uint64_t* previous = nullptr;
  for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::mbarrier_wait(&ring.full[cursor.stage], cursor.parity);
    const uint32_t stage = ptx::shared_address(ring.stage(cursor.stage));
    const uint32_t rows = stage + static_cast<uint32_t>(warpgroup) * 64 * kTileRow;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < static_cast<int>(kTileRow / kWgmmaDepthBytes); ++step) {
      ptx::wgmma<T, false, false>(acc, k_major_descriptor(rows, step),
                                  k_major_descriptor(stage + Tile::kInBytes, step));
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

template <int kFlags, class T, int kCount>
FK_DEVICE void finish_warp_rows(const float (&acc)[kCount], const Gather& g, FragmentPlace at,
                                const EpilogueParameters<T>& epilogue, float* patch, int32_t lane) {
#pragma unroll
  for (int block = 0; block < kCount / 16; ++block, at.column0 += kFragmentColumns) {
    if (at.column0 >= g.out_c) break;
    float fragment[kFragmentColumns / 8][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) fragment[i / 4][i % 4] = acc[16 * block + i];
    finish_fragment<kFlags>(fragment, g, at, epilogue, patch, lane);
  }
}

template <class T, class Tile, int kFlags>
__global__ void __launch_bounds__(kHopperThreads, 1)
    conv2d_hopper_gemm_kernel(const Gather g, const HopperGrid grid, const __grid_constant__ HopperMaps maps,
                              const EpilogueParameters<T> epilogue) {
#if defined(FK_SM90A) || !defined(__CUDACC__)
  FK_DYNAMIC_SHARED(shared);
  FK_SHARED(uint64_t, full, [Tile::kStages]);
  FK_SHARED(uint64_t, empty, [Tile::kStages]);
  const uint32_t lost = -ptx::shared_address(shared) & (kSwizzleAtom - 1);
  const HopperRing<Tile> ring{shared + lost, full, empty};
  const int32_t thread = static_cast<int32_t>(threadIdx.x), first = static_cast<int32_t>(blockIdx.x);
  const int32_t step = static_cast<int32_t>(gridDim.x);
  if (thread == 0) {
    for (int32_t i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kHopperConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are made

  RingCursor<Tile::kStages> cursor;
  FragmentPlace at;
  if (thread < 128) {
    ptx::give_registers<kProducerRegisters>();
    if (thread == 0) {
      for (int32_t tile = first; tile < grid.tiles; tile += step) {
        if (grid.place(g, tile, Tile::kColumns, &at)) produce_tile(g, grid, maps, at, ring, cursor);
      }
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    const int32_t warp = thread / 32 - 4, lane = thread % 32;
    float* const patch = reinterpret_cast<float*>(ring.stage(Tile::kStages) + warp * kPatchBytes);
    const int32_t blocks_of_channels = (g.in_c + Tile::kValues - 1) / Tile::kValues;
    for (int32_t tile = first; tile < grid.tiles; tile += step) {
      if (!grid.place(g, tile, Tile::kColumns, &at)) continue;
      float acc[Tile::kColumns / 2] = {};
      consume_tile<T>(acc, at.h.taps * at.w.taps * blocks_of_channels, warp / 4, lane, ring, cursor);
      at.row0 += kFragmentRows * warp;
      finish_warp_rows<kFlags>(acc, g, at, epilogue, patch, lane);
    }
  }
#endif
}

}  // namespace freezekit
