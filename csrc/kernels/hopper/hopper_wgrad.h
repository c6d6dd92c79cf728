// wgrad on Hopper (sm_90a) by wgmma and bulk tensor copies, for bf16 and f16: dw = dy^T * x; deterministic.
//
// core/wgrad.h has the formula; here columns are grouped in panels of 64 channels of one tap.
//
//   GEMM        | index            | tensor index | operand, brought by
//   row m       | output channel   | k of a group | A[m][l] = dy, tiled copies of (k, position)
//   column j    | filter element   | r, s, c      | B[l][j] = x, im2col copies of 64 channels at the tap's offset
//   reduction l | output position  | n, p, q      | 64 positions per k-tile
//
// Both are stored with channels along their rows, so they are MN-major operands, which wgmma has only for 16-bit types:
// tf32 is left to wgrad_gemm.h. Channels beyond a group's last bring what is there, into rows and columns that are not stored.
//
// The warps' roles and the ring are those of hopper_gemm.h. Positions are cut into slices; one slice stores dw, several
// store partial sums [slice][dw] in fp32.
#pragma once

#include "core/wgrad.h"
#include "kernels/hopper/hopper_ring.h"

namespace freezekit {

struct HopperWgradMaps {
  ptx::TensorMap dy, x;
};

// The work: panels, then rows, groups, slices.
struct HopperWgradGrid {
  PixelBoxes boxes;
  int32_t row_tiles = 0, column_tiles = 0, tiles = 0;
  int32_t panels = 0, panels_per_tap = 0;  // of a group
  int32_t vector = 0;                      // runs of eight channels are whole and 16-byte aligned in what is stored
};

struct HopperWgradPlace {
  int32_t row0, panel0, group, slice;
  int32_t first, last;  // positions

  FK_DEVICE HopperWgradPlace(const Wgrad& p, const HopperWgradGrid& grid, int32_t tile, int32_t panels) {
    int32_t rest = tile;
    panel0 = rest % grid.column_tiles * panels, rest /= grid.column_tiles;
    row0 = rest % grid.row_tiles * kHopperRows, rest /= grid.row_tiles;
    group = rest % p.groups, slice = rest / p.groups;
    first = min(slice * p.positions_per_slice, p.positions);
    last = min(first + p.positions_per_slice, p.positions);
  }
  FK_DEVICE int32_t k_tiles() const { return (last - first + kPanel - 1) / kPanel; }
};

// Issues the copies of one tile of one slice.
template <class Tile>
FK_DEVICE void produce_wgrad_tile(const Wgrad& p, const HopperWgradGrid& grid, const HopperWgradMaps& maps,
                                  const HopperWgradPlace& at, const HopperRing<Tile>& ring,
                                  RingCursor<Tile::kStages>& cursor) {
  constexpr int kPanels = Tile::kColumns / kPanel;
  int32_t channel[kPanels], offset_h[kPanels], offset_w[kPanels];
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const int32_t tap = (at.panel0 + i) / grid.panels_per_tap;
    channel[i] = at.group * p.c + (at.panel0 + i) % grid.panels_per_tap * kPanel;
    offset_h[i] = tap / p.w.taps * p.h.dilation, offset_w[i] = tap % p.w.taps * p.w.dilation;
  }
  const int32_t panels = min(grid.panels - at.panel0, kPanels);  // the rest of the stage is left as it is
  const uint32_t bytes = static_cast<uint32_t>(Tile::kABytes + panels * kPanelBytes);
  for (int32_t l = at.first; l < at.last; l += kPanel) {
    int32_t i, j;
    const int32_t line = p.divide_q.divide(l, &j), n = p.divide_p.divide(line, &i);
    uint64_t* const full = ring.refill(cursor, bytes);
    unsigned char* const stage = ring.stage(cursor.stage);
#pragma unroll
    for (int32_t half = 0; half < kHopperRows / kPanel; ++half) {
      ptx::copy_tile(stage + half * kPanelBytes, &maps.dy, full, at.group * p.k + at.row0 + half * kPanel, l);
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel >= panels) break;
      ptx::copy_im2col(stage + Tile::kABytes + panel * kPanelBytes, &maps.x, full,
                       {channel[panel], grid.boxes.w.pixel(j), grid.boxes.h.pixel(i), n}, offset_w[panel],
                       offset_h[panel]);
    }
    cursor.advance();
  }
}

// Stores a warp's 16 rows of dw, or of a slice of partial sums.
template <class Tile, class Out>
FK_DEVICE void store_wgrad_rows(Out* out, const float (&acc)[Tile::kColumns / 2], const Wgrad& p,
                                const HopperWgradGrid& grid, const HopperWgradPlace& at, int32_t warp, float* patch,
                                int32_t lane) {
  for_each_fragment(acc, [&](int block, const float (&fragment)[kFragmentColumns / 8][4]) {
    constexpr int kBlocks = kPanel / kFragmentColumns;  // of a panel
    const int32_t panel = at.panel0 + block / kBlocks;
    if (panel >= grid.panels) return false;
    const int32_t tap = panel / grid.panels_per_tap;
    const int32_t channel0 = panel % grid.panels_per_tap * kPanel + block % kBlocks * kFragmentColumns;
    for_each_run(fragment, patch, lane, [&](int32_t row, int32_t column, float (&run)[8]) {
      const int32_t m = at.row0 + kFragmentRows * warp + row, channel = channel0 + column;
      const int32_t count = min(p.c - channel, 8);
      if (m >= p.k || count <= 0) return;
      Out values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = cast<Out>(run[i]);
      store_run(out + p.dw_offset(at.group, m) + tap * p.c + channel, count, grid.vector, values);
    });
    return true;
  });
}

template <class T, class Tile>
__global__ void __launch_bounds__(kHopperThreads, 1)
    conv2d_wgrad_hopper_gemm_kernel(const Wgrad p, const HopperWgradGrid grid,
                                    const __grid_constant__ HopperWgradMaps maps, T* __restrict__ dw,
                                    float* __restrict__ partial) {
#if defined(FK_SM90A) || !defined(__CUDACC__)
  FK_DYNAMIC_SHARED(shared);
  FK_SHARED(uint64_t, full, [Tile::kStages]);
  FK_SHARED(uint64_t, empty, [Tile::kStages]);
  const HopperRing<Tile> ring = make_ring<Tile>(shared, full, empty);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), first = static_cast<int32_t>(blockIdx.x);
  const int32_t step = static_cast<int32_t>(gridDim.x);
  constexpr int kPanels = Tile::kColumns / kPanel;
  RingCursor<Tile::kStages> cursor;
  if (thread < 128) {
    ptx::give_registers<kProducerRegisters>();
    if (thread == 0) {
      for (int32_t tile = first; tile < grid.tiles; tile += step) {
        produce_wgrad_tile(p, grid, maps, HopperWgradPlace(p, grid, tile, kPanels), ring, cursor);
      }
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    const int32_t warp = thread / 32 - 4, lane = thread % 32;
    for (int32_t tile = first; tile < grid.tiles; tile += step) {
      const HopperWgradPlace at(p, grid, tile, kPanels);
      float acc[Tile::kColumns / 2] = {};
      multiply_stages<T, true>(acc, at.k_tiles(), warp / 4, lane, ring, cursor);
      if (partial) {
        store_wgrad_rows<Tile>(partial + at.slice * p.dw_numel(), acc, p, grid, at, warp, ring.patch(warp), lane);
      } else {
        store_wgrad_rows<Tile>(dw, acc, p, grid, at, warp, ring.patch(warp), lane);
      }
    }
  }
#endif
}

}  // namespace freezekit
