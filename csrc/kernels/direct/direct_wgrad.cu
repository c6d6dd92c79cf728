// wgrad for every stride, dilation, padding, group, channel count and dtype, without tensor cores; deterministic.
//
// core/wgrad.h has the formula and the GEMM's indices. Layouts: x, dy NHWC, dw KRSC, all dense; no alignment beyond the
// element's.
//
// The reduction is long and dw small, so it is cut into split_k slices (blockIdx.y) whose sums go to the workspace as
// [slice][dw] in the accumulator's type; they are added in a fixed order. One slice stores dw itself.
// A block of 128 threads makes a tile of kRows x kColumns in steps of 8 positions; each thread kThreadRows x 8.
#include <iterator>

#include "core/wgrad.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = kDirectStep;  // along the reduction

// Four blocks per multiprocessor: left to itself ptxas aims for nine of the small tile, and spills for it.
template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, 4)
    conv2d_direct_wgrad_kernel(const Wgrad p, const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dw,
                               Accumulator<T>* __restrict__ partial) {
  using Acc = Accumulator<T>;
  constexpr int kThreadRows = kRows * kColumns / (kThreads * 8);
  FK_SHARED(Acc, dy_tile, [kStep][kRows + 4]);
  FK_SHARED(Acc, x_tile, [kStep][kColumns + 4]);

  const int32_t tid = static_cast<int32_t>(threadIdx.x), block = static_cast<int32_t>(blockIdx.x);
  const int32_t columns = p.columns(), column_tiles = (columns + kColumns - 1) / kColumns;
  const int32_t row_tiles = (p.k + kRows - 1) / kRows;
  const int32_t column0 = block % column_tiles * kColumns;
  const int32_t row0 = block / column_tiles % row_tiles * kRows;
  const int32_t group = block / column_tiles / row_tiles;
  const int32_t slice_begin = static_cast<int32_t>(blockIdx.y) * p.positions_per_slice;
  const int32_t slice_end = min(slice_begin + p.positions_per_slice, p.positions);

  // Every thread loads one column of x, the same filter element at each step.
  constexpr int kColumnLanes = kThreads / kColumns;
  const int32_t j = column0 + tid % kColumns;
  const WgradColumn column = p.column(j);

  Acc acc[kThreadRows][8] = {};
  const int32_t thread_column = tid % (kColumns / 8) * 8, thread_row = tid / (kColumns / 8) * kThreadRows;
  for (int32_t l0 = slice_begin; l0 < slice_end; l0 += kStep) {
    for (int32_t i = tid; i < kRows * kStep; i += kThreads) {
      const int32_t m = row0 + i % kRows, l = l0 + i / kRows;
      const bool inside = m < p.k && l < slice_end;
      dy_tile[i / kRows][i % kRows] = inside ? cast<Acc>(load_global(dy + l * p.k_all() + group * p.k + m)) : Acc(0);
    }
#pragma unroll
    for (int32_t i = tid / kColumns; i < kStep; i += kColumnLanes) {
      Acc value = 0;
      int32_t there;
      if (j < columns && l0 + i < slice_end && p.meet(p.position(l0 + i), column, &there)) {
        value = cast<Acc>(load_global(x + there * p.c_all() + group * p.c + column.channel));
      }
      x_tile[i][tid % kColumns] = value;
    }
    __syncthreads();
#pragma unroll
    for (int l = 0; l < kStep; ++l) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const Acc a = dy_tile[l][thread_row + i];
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i][e] += a * x_tile[l][thread_column + e];
      }
    }
    __syncthreads();  // the next step overwrites the tiles
  }

#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int32_t m = row0 + thread_row + i;
    if (m >= p.k) continue;
    const int64_t offset = p.dw_offset(group, m) + column0 + thread_column;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (column0 + thread_column + e >= columns) continue;
      if (partial) {
        store_global(partial + blockIdx.y * p.dw_numel() + offset + e, acc[i][e]);
      } else {
        store_global(dw + offset + e, cast<T>(acc[i][e]));
      }
    }
  }
}

}  // namespace

Status launch_direct_wgrad(const Conv2dLaunch& launch) {
  const Conv2dProblem& p = launch.problem;
  const int split_k = launch.selection.split_k;
  const Wgrad wgrad = make_wgrad(p, split_k, kStep);
  return dispatch_config<std::size(kDirectWgradTiles)>(launch.selection.config, [&](auto config) {
    constexpr Tile tile = kDirectWgradTiles[config.value];
    const int64_t blocks = wgrad_blocks(p, tile);
    if (blocks > kMaxGridX) return Status::invalid_argument;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(split_k));
    return dispatch_dtype(launch.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto partial = static_cast<Accumulator<T>*>(split_k > 1 ? launch.workspace : nullptr);
      return FK_LAUNCH(conv2d_direct_wgrad_kernel<T, tile.rows, tile.columns>, grid, kThreads, 0, launch.stream, wgrad,
                       static_cast<const T*>(launch.tensors.y), static_cast<const T*>(launch.tensors.x),
                       static_cast<T*>(launch.tensors.filter), partial);
    });
  });
}

}  // namespace freezekit
