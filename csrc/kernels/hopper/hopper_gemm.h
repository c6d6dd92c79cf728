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
// A k-tile is one tap and 128 bytes of channels; both operands are K-major (hopper_ring.h). Channels beyond the last come
// as zeros, of both operands where there is one group.
//
// A block has three warpgroups: one thread of the first issues all copies, two multiply, 64 rows each. Blocks are
// persistent and walk the output tiles by the size of the grid, so that copies for the next tile are under way while this
// one is finished. A phase of a strided dgrad without taps stores the epilogue of zero.
#pragma once

#include "kernels/hopper/hopper_ring.h"

namespace freezekit {

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
        uint64_t* const full = ring.refill(cursor, Tile::kStageBytes);
        unsigned char* const stage = ring.stage(cursor.stage);
        if (grid.pointwise) {
          ptx::copy_tile(stage, in, full, channel0 + c, at.row0);
        } else {
          pixel.channel = channel0 + c;
          ptx::copy_im2col(stage, in, full, pixel, offset_w, offset_h);
        }
        ptx::copy_tile(stage + Tile::kABytes, &maps.filter, full, c, r * g.w.taps + s, filter_row);
        cursor.advance();
      }
    }
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
  const HopperRing<Tile> ring = make_ring<Tile>(shared, full, empty);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), first = static_cast<int32_t>(blockIdx.x);
  const int32_t step = static_cast<int32_t>(gridDim.x);
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
    const int32_t blocks_of_channels = (g.in_c + Tile::kValues - 1) / Tile::kValues;
    for (int32_t tile = first; tile < grid.tiles; tile += step) {
      if (!grid.place(g, tile, Tile::kColumns, &at)) continue;
      float acc[Tile::kColumns / 2] = {};
      multiply_stages<T, false>(acc, at.h.taps * at.w.taps * blocks_of_channels, warp / 4, lane, ring, cursor);
      at.row0 += kFragmentRows * warp;
      const int32_t column0 = at.column0;
      for_each_fragment(acc, [&](int block, const float (&fragment)[kFragmentColumns / 8][4]) {
        at.column0 = column0 + kFragmentColumns * block;
        if (at.column0 >= g.out_c) return false;
        finish_fragment<kFlags>(fragment, g, at, epilogue, ring.patch(warp), lane);
        return true;
      });
    }
  }
#endif
}

}  // namespace freezekit
