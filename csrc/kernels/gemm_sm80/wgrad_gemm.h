// wgrad on tensor cores (sm_80 and later): dw = dy^T * x, x gathered while it is loaded; deterministic.
//
// core/wgrad.h has the formula and the GEMM's indices. Layouts: x, dy NHWC, dw KRSC, all dense. Types: bf16 and f16,
// and float through tf32; sums are fp32.
//
//   operand  | tensor | in shared memory as
//   A[m][l]  | dy     | rows l of kRows output channels, as in memory
//   B[l][j]  | x      | rows l of kColumns filter elements, runs of input channels of one tap
//
// Both are stored with the reduction across rows, so fragments are read transposed: 16-bit types by ldmatrix.trans, float
// by plain loads, since ldmatrix cannot transpose it. Rows are padded by 16 bytes (32 for float), so that the eight
// rows of an ldmatrix, or the four rows by eight columns of a load, fall into different banks.
//
// Chunks of 16 bytes go by cp.async through a ring of stages where channels come in whole chunks and pointers are
// 16-byte aligned; any other operand (kChunksOf... false) is loaded element by element.
//
// blockIdx.y is the slice of the reduction. One slice stores dw; several store partial sums [slice][dw] in fp32.
#pragma once

#include "core/wgrad.h"
#include "kernels/families.h"
#include "kernels/gemm_sm80/ring.h"
#include "kernels/gemm_sm80/tensor_core.h"
#include "kernels/numeric.h"

namespace freezekit {

// Warps are in a grid of kWarpRows x (kColumns / 32), each with a tile of kRows / kWarpRows x 32.
template <int kRowsOfTile, int kColumnsOfTile, int kWarpRows>
struct WgradTile {
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile;
  static constexpr int kWarpTileRows = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kWarpRows * kWarpsAcross * 32;
};

// The part of a stage that holds one operand: kDepth rows of kWidth values.
template <class T, int kWidthOfTile, int kThreads>
struct WgradOperand {
  static constexpr int kWidth = kWidthOfTile;
  static constexpr int kDepth = 2 * kMmaDepth<T>;
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kPadding = std::is_same_v<T, float> ? 2 * kChunk : kChunk;
  static constexpr int kPitch = (kWidth + kPadding) * static_cast<int>(sizeof(T));
  static constexpr int kBytes = kDepth * kPitch;
  static constexpr int kChunksAcross = kWidth / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunksAcross;
  static constexpr int kPasses = kDepth / kRowsAtOnce;
  static_assert(kDepth * sizeof(T) == kGemmStepBytes);
  static_assert(kDepth % kRowsAtOnce == 0 && kThreads % kChunksAcross == 0, "threads load whole rows");

  // This thread's share: chunk column of rows row() + i * kRowsAtOnce.
  FK_DEVICE static int32_t column() { return static_cast<int32_t>(threadIdx.x) % kChunksAcross * kChunk; }
  FK_DEVICE static int32_t row() { return static_cast<int32_t>(threadIdx.x) / kChunksAcross; }
  FK_DEVICE static unsigned char* at(unsigned char* operand, int32_t l, int32_t column) {
    return operand + l * kPitch + column * static_cast<int32_t>(sizeof(T));
  }
  FK_DEVICE static void store_elements(unsigned char* to, const T (&values)[kChunk]) {
    uint4 packed;
    memcpy(&packed, values, kChunkBytes);
    *reinterpret_cast<uint4*>(to) = packed;
  }

  // The 16 x depth fragment of A at (columns m of the operand, rows l).
  FK_DEVICE static void load_a(uint32_t (&a)[4], unsigned char* operand, int32_t l, int32_t m, int32_t lane) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = load_one(operand, l + lane % 4 + i / 2 * 4, m + lane / 4 + i % 2 * 8);
    } else {
      ptx::ldmatrix_trans(a, at(operand, l + lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8));
    }
  }

  // The two depth x 8 fragments of B at (rows l, columns j of the operand) and at columns j + 8.
  FK_DEVICE static void load_b(uint32_t (&b)[4], unsigned char* operand, int32_t l, int32_t j, int32_t lane) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = load_one(operand, l + lane % 4 + i % 2 * 4, j + lane / 4 + i / 2 * 8);
    } else {
      ptx::ldmatrix_trans(b, at(operand, l + lane % 16, j + lane / 16 * 8));
    }
  }

  FK_DEVICE static uint32_t load_one(unsigned char* operand, int32_t l, int32_t column) {
    return *reinterpret_cast<const uint32_t*>(at(operand, l, column));
  }
};

template <class T, class Tile, bool kChunksOfDy, bool kChunksOfX>
struct WgradLoader {
  using Dy = WgradOperand<T, Tile::kRows, Tile::kThreads>;
  using X = WgradOperand<T, Tile::kColumns, Tile::kThreads>;
  static constexpr int kStageBytes = Dy::kBytes + X::kBytes;

  const T* dy;                    // at this thread's first output channel
  const T* x;                     // at the first channel of the group
  int32_t dy_columns, x_columns;  // that exist from this thread's first one on; may be negative
  WgradColumn column[kChunksOfX ? 1 : X::kChunk];
  int32_t l, end;  // the next k-tile, the end of the slice

  FK_DEVICE void start(const Wgrad& p, const T* dy_all, const T* x_all, int32_t row0, int32_t column0, int32_t group) {
    dy = dy_all + static_cast<int64_t>(group) * p.k + row0 + Dy::column();
    x = x_all + static_cast<int64_t>(group) * p.c;
    dy_columns = p.k - row0 - Dy::column();
    x_columns = p.columns() - column0 - X::column();
#pragma unroll
    for (int e = 0; e < (kChunksOfX ? 1 : X::kChunk); ++e) column[e] = p.column(column0 + X::column() + e);
    l = static_cast<int32_t>(blockIdx.y) * p.positions_per_slice;
    end = min(l + p.positions_per_slice, p.positions);
  }

  FK_DEVICE void load(const Wgrad& p, unsigned char* stage) {
    load_dy(p, stage);
    load_x(p, stage + Dy::kBytes);
    l += Dy::kDepth;
  }

  FK_DEVICE void load_dy(const Wgrad& p, unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < Dy::kPasses; ++i) {
      const int32_t row = Dy::row() + i * Dy::kRowsAtOnce;
      const bool row_inside = l + row < end;
      const T* const from = dy + (l + row) * p.k_all();
      unsigned char* const to = Dy::at(stage, row, Dy::column());
      if constexpr (kChunksOfDy) {
        const bool inside = row_inside && dy_columns > 0;
        ptx::cp_async<kChunkBytes>(to, inside ? from : dy, inside);
      } else {
        T values[Dy::kChunk];
#pragma unroll
        for (int e = 0; e < Dy::kChunk; ++e) {
          values[e] = row_inside && e < dy_columns ? load_global(from + e) : cast<T>(0.0f);
        }
        Dy::store_elements(to, values);
      }
    }
  }

  FK_DEVICE void load_x(const Wgrad& p, unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < X::kPasses; ++i) {
      const int32_t row = X::row() + i * X::kRowsAtOnce;
      const bool row_inside = l + row < end;
      const WgradPosition position = p.position(l + row);
      unsigned char* const to = X::at(stage, row, X::column());
      int32_t there;
      if constexpr (kChunksOfX) {
        const bool inside = p.meet(position, column[0], &there) && row_inside && x_columns > 0;
        ptx::cp_async<kChunkBytes>(to, inside ? x + there * p.c_all() + column[0].channel : x, inside);
      } else {
        T values[X::kChunk];
#pragma unroll
        for (int e = 0; e < X::kChunk; ++e) {
          const bool inside = p.meet(position, column[e], &there) && row_inside && e < x_columns;
          values[e] = inside ? load_global(x + there * p.c_all() + column[e].channel) : cast<T>(0.0f);
        }
        X::store_elements(to, values);
      }
    }
  }
};

// Stores columns j and j + 1 of a row of dw, or of a slice of partial sums; `pairs`: both exist and are one access.
template <class Out>
FK_DEVICE void store_pair(Out* row, int32_t j, int32_t columns, bool pairs, float first, float second) {
  if (pairs) {
    if (j < columns) {
      struct alignas(2 * sizeof(Out)) Pair {
        Out first, second;
      };
      store_global(reinterpret_cast<Pair*>(row + j), Pair{cast<Out>(first), cast<Out>(second)});
    }
    return;
  }
  if (j < columns) store_global(row + j, cast<Out>(first));
  if (j + 1 < columns) store_global(row + j + 1, cast<Out>(second));
}

// A warp's part of dw, or of a slice of partial sums. A quad of lanes stores eight neighbouring elements of a row.
template <class Tile, class Out>
FK_DEVICE void store_tile(Out* out, const float (&acc)[Tile::kWarpTileRows / 16][kWarpColumns / 8][4], const Wgrad& p,
                          int32_t group, int32_t row0, int32_t column0, int32_t lane) {
  const int32_t columns = p.columns();
  const bool pairs = columns % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Out)) == 0;
#pragma unroll
  for (int i = 0; i < Tile::kWarpTileRows / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t m = row0 + 16 * i + lane / 4 + 8 * half;
      if (m >= p.k) continue;
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        store_pair(out + p.dw_offset(group, m), column0 + 8 * j + lane % 4 * 2, columns, pairs, acc[i][j][2 * half],
                   acc[i][j][2 * half + 1]);
      }
    }
  }
}

template <class T, class Tile, bool kChunksOfDy, bool kChunksOfX>
__global__ void __launch_bounds__(Tile::kThreads)
    conv2d_wgrad_gemm_kernel(const Wgrad p, const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dw,
                             float* __restrict__ partial) {
  using Loader = WgradLoader<T, Tile, kChunksOfDy, kChunksOfX>;
  using Dy = typename Loader::Dy;
  using X = typename Loader::X;
  FK_DYNAMIC_SHARED(shared);
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t columns = p.columns(), column_tiles = (columns + Tile::kColumns - 1) / Tile::kColumns;
  const int32_t row_tiles = (p.k + Tile::kRows - 1) / Tile::kRows;
  const int32_t column0 = block % column_tiles * Tile::kColumns;
  const int32_t row0 = block / column_tiles % row_tiles * Tile::kRows;
  const int32_t group = block / column_tiles / row_tiles;

  Loader loader;
  loader.start(p, dy, x, row0, column0, group);
  const int32_t tiles = loader.end > loader.l ? (loader.end - loader.l + Dy::kDepth - 1) / Dy::kDepth : 0;

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_row = warp / Tile::kWarpsAcross * Tile::kWarpTileRows;
  const int32_t warp_column = warp % Tile::kWarpsAcross * kWarpColumns;
  float acc[Tile::kWarpTileRows / 16][kWarpColumns / 8][4] = {};
  const auto multiply_tile = [&](int32_t stage) {
    unsigned char* const dy_stage = shared + stage * Loader::kStageBytes;
#pragma unroll
    for (int step = 0; step < Dy::kDepth; step += kMmaDepth<T>) {
      multiply_step<T>(
          acc, [&](uint32_t (&a)[4], int i) { Dy::load_a(a, dy_stage, step, warp_row + 16 * i, lane); },
          [&](uint32_t (&b)[4], int j) { X::load_b(b, dy_stage + Dy::kBytes, step, warp_column + 16 * j, lane); });
    }
  };
  run_ring<kGemmStages>(
      tiles, [&](int32_t stage) { loader.load(p, shared + stage * Loader::kStageBytes); }, multiply_tile);

  if (partial) {
    store_tile<Tile>(partial + blockIdx.y * p.dw_numel(), acc, p, group, row0 + warp_row, column0 + warp_column, lane);
  } else {
    store_tile<Tile>(dw, acc, p, group, row0 + warp_row, column0 + warp_column, lane);
  }
}

}  // namespace freezekit
