// fprop and dgrad on tensor cores (sm_80 and later), as one GEMM whose A operand is gathered while it is loaded.
//
//   out[n, oh, ow, j] = epilogue(sum over taps (t, u) and channels c of in[n, ih, iw, c] * f[j, t, u, c])
//
//   GEMM        | index                  | fprop         | dgrad
//   row m       | output position        | n, p, q       | n and the h, w of the phase
//   column j    | output channel         | k of a group  | c of a group
//   reduction l | tap and input channel  | r, s, c       | the phase's r, s and k
//   A[m][l]     | in                     | x, NHWC       | dy, NHWC
//   B[l][j]     | f[j][t][u][c]          | filter, KRSC  | W', the filter as CRSK (filter_transform.cu)
//
// core/gather.h says which taps and positions meet; a phase of a strided dgrad is one (blockIdx.y, blockIdx.z), and one
// without taps stores the epilogue of zero. Types: bf16 and f16, and float through tf32; sums are fp32.
//
// Mainloop: rows of both operands are cut into chunks of 16 bytes along l; a k-tile is four chunks wide, so that a row
// of it takes 64 bytes of shared memory. cp.async fills a ring of `stages` k-tiles, ldmatrix reads them as fragments.
// Chunk `c` of row `r` is at 16-byte slot c ^ (r / 2 % 4) of its row: eight rows in a column of chunks then touch all
// 32 banks once. Each thread loads the same chunk column of every k-tile, so it walks the reduction with one cursor.
//
// Alignment: Access::pointwise and Access::chunks need input channels of a group in whole chunks and 16-byte aligned
// pointers; Access::elements takes anything, by ordinary loads of single elements.
#pragma once

#include "core/gather.h"
#include "kernels/families.h"
#include "kernels/gemm_sm80/finish_fragment.h"
#include "kernels/gemm_sm80/ring.h"
#include "kernels/gemm_sm80/tensor_core.h"

namespace freezekit {

enum class Access {
  pointwise,  // a 1x1 filter, stride 1, no padding: row m of A is row m of the input, a plain GEMM
  chunks,     // taps and padding, 16 bytes at a time
  elements,   // the same for any channel count
};

constexpr int kTileChunks = kGemmStepBytes / kChunkBytes;  // chunks along l in one k-tile
constexpr int kTileRowBytes = kGemmStepBytes;              // 32 values of 16 bits, 16 of 32 bits

FK_DEVICE int32_t chunk_offset(int32_t row, int32_t chunk) {
  return row * kTileRowBytes + ((chunk ^ (row >> 1 & 3)) * kChunkBytes);
}

// The shape of a block's work; warps are in a grid of warp_rows x (columns / 32).
template <int kRowsOfTile, int kColumnsOfTile, int kWarpRows, int kStagesOfTile>
struct GemmTile {
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile, kStages = kStagesOfTile;
  static constexpr int kWarpTileRows = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarps = kWarpRows * kWarpsAcross, kThreads = kWarps * 32;
  static constexpr int kStageBytes = (kRows + kColumns) * kTileRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kLoadRows = kThreads / kTileChunks;  // rows that the block loads at once
  static_assert(kWarps * kPatchBytes <= kSharedBytes, "the epilogue reuses the memory of the ring");
};

// One thread's share of loading k-tiles: chunk column threadIdx.x % 4 of rows threadIdx.x / 4 + i * kLoadRows.
template <class T, class Tile, Access kAccess>
struct Loader {
  static constexpr int kChunk = kChunkBytes / sizeof(T);
  static constexpr int kInRows = Tile::kRows / Tile::kLoadRows;
  static constexpr int kFilterRows = Tile::kColumns / Tile::kLoadRows;

  const T* in;                   // at the first channel of the group
  const T* filter;               // at the first row of the tile
  GatherOrigin origin[kInRows];  // where pointwise, `ih` alone: the position
  GatherCursor at;
  int32_t filter_rows;  // of the tile that exist

  FK_DEVICE void start(const Gather& g, const GatherAxis& h, const GatherAxis& w, const T* in_all, const T* filter_all,
                       int32_t row0, int32_t rows, int32_t column0, int32_t group) {
    const int32_t tid = static_cast<int32_t>(threadIdx.x);
    in = in_all + static_cast<int64_t>(group) * g.in_c;
    filter = filter_all + (static_cast<int64_t>(group) * g.out_c + column0) * g.filter_row();
    filter_rows = g.out_c - column0;
#pragma unroll
    for (int i = 0; i < kInRows; ++i) {
      const int32_t m = row0 + tid / kTileChunks + i * Tile::kLoadRows;
      if (m >= rows) continue;
      if constexpr (kAccess == Access::pointwise) {
        origin[i].ih = m;
      } else {
        origin[i] = g.origin(m, static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.z), h, w);
      }
    }
    if (h.taps > 0 && w.taps > 0) at.advance(tid % kTileChunks * kChunk, g.in_c, w.taps);
  }

  // Whether row i meets the input at the cursor's tap, and where: as a position n, h, w.
  FK_DEVICE bool position(const Gather& g, const GatherAxis& h, const GatherAxis& w, const GatherCursor& cursor, int i,
                          int32_t* position) const {
    if constexpr (kAccess == Access::pointwise) {
      *position = origin[i].ih;
      return origin[i].ih >= 0 && cursor.tap_h == 0;
    } else {
      const int32_t ih = origin[i].ih + cursor.tap_h * h.in_step, iw = origin[i].iw + cursor.tap_w * w.in_step;
      const bool inside = cursor.tap_h < h.taps && ih >= 0 && ih < g.in_h && iw >= 0 && iw < g.in_w;
      *position = inside ? origin[i].image + ih * g.in_w + iw : 0;  // outside it may overflow
      return inside;
    }
  }

  FK_DEVICE static int32_t filter_offset(const Gather& g, const GatherAxis& h, const GatherAxis& w,
                                         const GatherCursor& cursor) {
    if constexpr (kAccess == Access::pointwise) return cursor.channel;
    const int32_t r = h.filter_first + cursor.tap_h * h.filter_step, s = w.filter_first + cursor.tap_w * w.filter_step;
    return (r * g.w.taps + s) * g.in_c + cursor.channel;
  }

  // Fills a stage with the k-tile at the cursor, zeros where there is nothing, and moves on to the next.
  FK_DEVICE void load(const Gather& g, const GatherAxis& h, const GatherAxis& w, unsigned char* stage) {
    const int32_t tid = static_cast<int32_t>(threadIdx.x);
    const int32_t row = tid / kTileChunks, chunk = tid % kTileChunks;
    const int32_t in_channels = g.in_c * g.groups;
    unsigned char* const filter_stage = stage + Tile::kRows * kTileRowBytes;
    if constexpr (kAccess == Access::elements) {
      load_elements(g, h, w, in_channels, stage, filter_stage);
    } else {
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        int32_t there;
        const bool inside = position(g, h, w, at, i, &there);
        const T* const from = inside ? in + static_cast<int64_t>(there) * in_channels + at.channel : in;
        ptx::cp_async<kChunkBytes>(stage + chunk_offset(row + i * Tile::kLoadRows, chunk), from, inside);
      }
      const T* const from = filter + filter_offset(g, h, w, at);
      const bool tap_inside = kAccess == Access::pointwise ? at.tap_h == 0 : at.tap_h < h.taps;
#pragma unroll
      for (int i = 0; i < kFilterRows; ++i) {
        const int32_t j = row + i * Tile::kLoadRows;
        const bool inside = tap_inside && j < filter_rows;
        const T* const from_row = inside ? from + static_cast<int64_t>(j) * g.filter_row() : filter;
        ptx::cp_async<kChunkBytes>(filter_stage + chunk_offset(j, chunk), from_row, inside);
      }
    }
    at.advance(kTileChunks * kChunk, g.in_c, w.taps);
  }

  FK_DEVICE void load_elements(const Gather& g, const GatherAxis& h, const GatherAxis& w, int32_t in_channels,
                               unsigned char* stage, unsigned char* filter_stage) {
    const int32_t tid = static_cast<int32_t>(threadIdx.x);
    const int32_t row = tid / kTileChunks, chunk = tid % kTileChunks;
    T values[kInRows + kFilterRows][kChunk];
    GatherCursor element = at;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        int32_t there;
        const bool inside = position(g, h, w, element, i, &there);
        const T* const from = in + static_cast<int64_t>(there) * in_channels + element.channel;
        values[i][e] = inside ? load_global(from) : cast<T>(0.0f);
      }
      const T* const from = filter + filter_offset(g, h, w, element);
#pragma unroll
      for (int i = 0; i < kFilterRows; ++i) {
        const int32_t j = row + i * Tile::kLoadRows;
        const bool inside = element.tap_h < h.taps && j < filter_rows;
        values[kInRows + i][e] = inside ? load_global(from + static_cast<int64_t>(j) * g.filter_row()) : cast<T>(0.0f);
      }
      element.advance(1, g.in_c, w.taps);
    }
#pragma unroll
    for (int i = 0; i < kInRows + kFilterRows; ++i) {
      uint4 packed;
      memcpy(&packed, values[i], kChunkBytes);
      unsigned char* const to = i < kInRows ? stage + chunk_offset(row + i * Tile::kLoadRows, chunk)
                                            : filter_stage + chunk_offset(row + (i - kInRows) * Tile::kLoadRows, chunk);
      *reinterpret_cast<uint4*>(to) = packed;
    }
  }
};

// acc += the product of one k-tile.
template <class T, class Tile>
FK_DEVICE void multiply_tile(float (&acc)[Tile::kWarpTileRows / 16][kWarpColumns / 8][4], const unsigned char* stage,
                             int32_t warp_row, int32_t warp_column, int32_t lane) {
  const unsigned char* const filter_stage = stage + Tile::kRows * kTileRowBytes;
#pragma unroll
  for (int step = 0; step < kTileChunks / 2; ++step) {
    // Matrices of one ldmatrix: for A rows 0-7 and 8-15 of the first chunk, then of the second; for B both chunks of
    // columns 0-7, then of columns 8-15.
    multiply_step<T>(
        acc,
        [&](uint32_t (&a)[4], int i) {
          ptx::ldmatrix(a, stage + chunk_offset(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
        },
        [&](uint32_t (&b)[4], int j) {
          const int32_t column = warp_column + 16 * j + lane / 16 * 8 + lane % 8;
          ptx::ldmatrix(b, filter_stage + chunk_offset(column, 2 * step + lane / 8 % 2));
        });
  }
}

template <class T, class Tile, Access kAccess, int kFlags>
__global__ void __launch_bounds__(Tile::kThreads)
    conv2d_implicit_gemm_kernel(const Gather g, const T* __restrict__ in, const T* __restrict__ filter,
                                const EpilogueParameters<T> epilogue) {
  FK_DYNAMIC_SHARED(shared);
  const GatherAxis h = g.axis_h(static_cast<int32_t>(blockIdx.y)), w = g.axis_w(static_cast<int32_t>(blockIdx.z));
  const int32_t rows = g.batch * h.count * w.count;
  const int32_t column_tiles = (g.out_c + Tile::kColumns - 1) / Tile::kColumns;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t column0 = block % column_tiles * Tile::kColumns;
  const int32_t group = block / column_tiles % g.groups;
  const int32_t row0 = block / column_tiles / g.groups * Tile::kRows;
  if (row0 >= rows) return;  // a smaller phase than the one the grid was made for

  constexpr int kTileValues = kTileRowBytes / static_cast<int>(sizeof(T));
  const int32_t tiles = (h.taps * w.taps * g.in_c + kTileValues - 1) / kTileValues;
  Loader<T, Tile, kAccess> loader;
  loader.start(g, h, w, in, filter, row0, rows, column0, group);

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_row = warp / Tile::kWarpsAcross * Tile::kWarpTileRows;
  const int32_t warp_column = warp % Tile::kWarpsAcross * kWarpColumns;
  float acc[Tile::kWarpTileRows / 16][kWarpColumns / 8][4] = {};
  run_ring<Tile::kStages>(
      tiles, [&](int32_t stage) { loader.load(g, h, w, shared + stage * Tile::kStageBytes); },
      [&](int32_t stage) {
        multiply_tile<T, Tile>(acc, shared + stage * Tile::kStageBytes, warp_row, warp_column, lane);
      });
  __syncthreads();  // the ring becomes the warps' patches

  float* const patch = reinterpret_cast<float*>(shared + warp * kPatchBytes);
  FragmentPlace at{static_cast<int32_t>(blockIdx.y),
                   static_cast<int32_t>(blockIdx.z),
                   h,
                   w,
                   rows,
                   group,
                   row0 + warp_row,
                   column0 + warp_column};
#pragma unroll
  for (int i = 0; i < Tile::kWarpTileRows / 16; ++i, at.row0 += 16) {
    finish_fragment<kFlags>(acc[i], g, at, epilogue, patch, lane);
  }
}

}  // namespace freezekit
