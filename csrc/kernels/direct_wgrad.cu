// wgrad for every stride, dilation, padding, group, channel count and dtype, without tensor cores; deterministic.
//
//   dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * x[n, p * stride_h - pad_h + r * dilation_h, ..., c]
//
// Layouts: x, dy NHWC, dw KRSC, all dense; no alignment beyond the element's.
//
//   GEMM        | index            | tensor index
//   row m       | output channel   | k of a group
//   column j    | filter element   | r, s, c of a group
//   reduction l | output position  | n, p, q
//
// The reduction is long and dw small, so it is cut into split_k slices (blockIdx.y) whose sums go to the workspace as
// [slice][dw] in the accumulator's type; launch_ordered_reduce adds them in a fixed order. One slice stores dw itself.
// A block of 128 threads makes a tile of kRows x kColumns in steps of 8 positions; each thread kThreadRows x 8.
#include "core/fast_divide.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = 8;  // along the reduction

struct WgradParameters {
  ConvAxisPair axis;
  int32_t positions = 0;            // n * p * q
  int32_t positions_per_slice = 0;
  int32_t groups = 1, c = 0, k = 0;  // c, k: of one group
  FastDivide divide_q, divide_p, divide_c, divide_s;
};

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_wgrad_kernel(const WgradParameters p, const T* __restrict__ dy, const T* __restrict__ x,
                               T* __restrict__ dw, Accumulator<T>* __restrict__ partial) {
  using Acc = Accumulator<T>;
  constexpr int kThreadRows = kRows * kColumns / (kThreads * 8);
  FK_SHARED(Acc, dy_tile, [kStep][kRows + 4]);
  FK_SHARED(Acc, x_tile, [kStep][kColumns + 4]);

  const int32_t tid = static_cast<int32_t>(threadIdx.x), block = static_cast<int32_t>(blockIdx.x);
  const int32_t filter_size = p.axis.h.taps * p.axis.w.taps * p.c;
  const int32_t column_tiles = (filter_size + kColumns - 1) / kColumns, row_tiles = (p.k + kRows - 1) / kRows;
  const int32_t column0 = block % column_tiles * kColumns;
  const int32_t row0 = block / column_tiles % row_tiles * kRows;
  const int32_t group = block / column_tiles / row_tiles;
  const int64_t k_all = static_cast<int64_t>(p.k) * p.groups, c_all = static_cast<int64_t>(p.c) * p.groups;
  const int32_t slice_begin = static_cast<int32_t>(blockIdx.y) * p.positions_per_slice;
  const int32_t slice_end = min(slice_begin + p.positions_per_slice, p.positions);

  // Every thread loads one column of x, the same filter element at each step.
  constexpr int kColumnLanes = kThreads / kColumns;
  const int32_t j = column0 + tid % kColumns;
  const bool column_inside = j < filter_size;
  int32_t channel, tap_w;
  const int32_t tap_h = p.divide_s.divide(p.divide_c.divide(j, &channel), &tap_w);
  const int32_t h_of_tap = tap_h * p.axis.h.dilation - p.axis.h.pad, w_of_tap = tap_w * p.axis.w.dilation - p.axis.w.pad;

  Acc acc[kThreadRows][8] = {};
  const int32_t thread_column = tid % (kColumns / 8) * 8, thread_row = tid / (kColumns / 8) * kThreadRows;
  for (int32_t l0 = slice_begin; l0 < slice_end; l0 += kStep) {
    for (int32_t i = tid; i < kRows * kStep; i += kThreads) {
      const int32_t m = row0 + i % kRows, l = l0 + i / kRows;
      const bool inside = m < p.k && l < slice_end;
      dy_tile[i / kRows][i % kRows] = inside ? cast<Acc>(load_global(dy + l * k_all + group * p.k + m)) : Acc(0);
    }
#pragma unroll
    for (int32_t i = tid / kColumns; i < kStep; i += kColumnLanes) {
      Acc value = 0;
      if (column_inside && l0 + i < slice_end) {
        int32_t q, row;
        const int32_t line = p.divide_q.divide(l0 + i, &q), n = p.divide_p.divide(line, &row);
        const int32_t ih = row * p.axis.h.stride + h_of_tap, iw = q * p.axis.w.stride + w_of_tap;
        if (ih >= 0 && ih < p.axis.h.x && iw >= 0 && iw < p.axis.w.x) {
          const int64_t position = (n * p.axis.h.x + ih) * p.axis.w.x + iw;
          value = cast<Acc>(load_global(x + position * c_all + group * p.c + channel));
        }
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

  const int64_t numel = k_all * filter_size;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int32_t m = row0 + thread_row + i;
    if (m >= p.k) continue;
    const int64_t offset = (static_cast<int64_t>(group) * p.k + m) * filter_size + column0 + thread_column;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (column0 + thread_column + e >= filter_size) continue;
      if (partial) {
        store_global(partial + blockIdx.y * numel + offset + e, acc[i][e]);
      } else {
        store_global(dw + offset + e, cast<T>(acc[i][e]));
      }
    }
  }
}

}  // namespace

Status launch_direct_wgrad(int config, int split_k, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors,
                           void* workspace, Stream stream) {
  if (config < 0 || config > 1 || split_k < 1 || split_k > kMaxGridYZ) return Status::invalid_argument;
  if (split_k > 1 && !workspace) return Status::invalid_argument;
  const int64_t blocks = wgrad_blocks(p, kDirectWgradTiles[config]);
  if (blocks > kMaxGridX) return Status::invalid_argument;
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  WgradParameters parameters;
  parameters.axis = make_axes(p);
  parameters.positions = narrow(p.n * p.p * p.q);
  parameters.positions_per_slice = narrow(ceil_div(parameters.positions, split_k));
  parameters.groups = narrow(p.groups), parameters.c = narrow(p.c_per_group()), parameters.k = narrow(p.k_per_group());
  parameters.divide_q = FastDivide(narrow(p.q)), parameters.divide_p = FastDivide(narrow(p.p));
  parameters.divide_c = FastDivide(parameters.c), parameters.divide_s = FastDivide(narrow(p.s));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(split_k));
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr Tile wide = kDirectWgradTiles[0], narrow_tile = kDirectWgradTiles[1];
    const auto kernel = config == 0 ? conv2d_direct_wgrad_kernel<T, wide.rows, wide.columns>
                                    : conv2d_direct_wgrad_kernel<T, narrow_tile.rows, narrow_tile.columns>;
    const auto partial = static_cast<Accumulator<T>*>(split_k > 1 ? workspace : nullptr);
    const Status status = FK_LAUNCH(kernel, grid, kThreads, 0, stream, parameters, static_cast<const T*>(tensors.y),
                                    static_cast<const T*>(tensors.x), static_cast<T*>(tensors.filter), partial);
    if (status != Status::success || split_k == 1) return status;
    return launch_ordered_reduce(partial, tensors.filter, p.filter_numel(), split_k, dtype, stream);
  });
}

}  // namespace freezekit
