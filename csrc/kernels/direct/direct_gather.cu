// fprop and dgrad for every stride, dilation, padding, group, channel count and dtype, without tensor cores.
//
//   out[n, oh, ow, j] = epilogue(sum over taps (t, u) and channels c of in[n, ih, iw, c] * f[j, t, u, c])
//
// Layouts: in, out NHWC, filter KRSC, all dense; no alignment beyond the element's. core/gather.h says which taps and
// positions meet; a phase of a strided dgrad is one (blockIdx.y, blockIdx.z).
//
//   GEMM        | index                  | fprop         | dgrad
//   row m       | output position        | n, p, q       | n and the h, w of the phase
//   column j    | output channel         | k of a group  | c of a group
//   reduction l | tap and input channel  | r, s, c       | the phase's r, s and k
//
// A block of 128 threads makes a tile of kRows x kColumns outputs in steps of 8 along l; each thread kThreadRows x 8.
#include <iterator>

#include "core/gather.h"
#include "kernels/epilogue.h"
#include "kernels/families.h"

namespace freezekit {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = kDirectStep;            // along the reduction
constexpr int kLoadLanes = kThreads / kStep;  // rows or columns that are loaded at once

// One step of the tile of `in`: this thread's element of the reduction for kLoads rows, zero where they do not meet.
template <class T, int kRows, int kLoads>
FK_DEVICE void load_in(Accumulator<T> (&tile)[kStep][kRows + 4], const Gather& g, const GatherAxis& h,
                       const GatherAxis& w, const GatherOrigin (&origin)[kLoads], const GatherCursor& at, const T* in,
                       int32_t lane_l, int32_t lane_m) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int32_t ih = origin[i].ih + at.tap_h * h.in_step, iw = origin[i].iw + at.tap_w * w.in_step;
    Accumulator<T> value = 0;
    if (at.tap_h < h.taps && ih >= 0 && ih < g.in_h && iw >= 0 && iw < g.in_w) {
      const int64_t position = origin[i].image + ih * g.in_w + iw;
      value = cast<Accumulator<T>>(load_global(in + position * (g.in_c * g.groups) + at.channel));
    }
    tile[lane_l][lane_m + i * kLoadLanes] = value;
  }
}

// One step of the tile of the filter, KRSC, whose roles of k and c dgrad exchanges.
template <class T, int kColumns>
FK_DEVICE void load_filter(Accumulator<T> (&tile)[kStep][kColumns + 4], const Gather& g, const GatherAxis& h,
                           const GatherAxis& w, const GatherCursor& at, const T* filter, int32_t group, int32_t column0,
                           int32_t lane_l, int32_t lane_m) {
  const int32_t r = h.filter_first + at.tap_h * h.filter_step, s = w.filter_first + at.tap_w * w.filter_step;
  const int64_t taps = static_cast<int64_t>(g.h.taps) * g.w.taps, tap = r * g.w.taps + s;
#pragma unroll
  for (int column = lane_m; column < kColumns; column += kLoadLanes) {
    const int32_t j = column0 + column;
    Accumulator<T> value = 0;
    if (at.tap_h < h.taps && j < g.out_c) {
      const int64_t in_channel = static_cast<int64_t>(group) * g.in_c + at.channel;
      const int64_t out_channel = static_cast<int64_t>(group) * g.out_c + j;
      const int64_t offset =
          g.transposed ? (in_channel * taps + tap) * g.out_c + j : (out_channel * taps + tap) * g.in_c + at.channel;
      value = cast<Accumulator<T>>(load_global(filter + offset));
    }
    tile[lane_l][column] = value;
  }
}

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_gather_kernel(const Gather g, const T* __restrict__ in, const T* __restrict__ filter,
                                const EpilogueParameters<T> epilogue) {
  using Acc = Accumulator<T>;
  constexpr int kThreadRows = kRows * kColumns / (kThreads * 8);
  constexpr int kRowLoads = kRows / kLoadLanes;
  FK_SHARED(Acc, in_tile, [kStep][kRows + 4]);
  FK_SHARED(Acc, filter_tile, [kStep][kColumns + 4]);

  const int32_t tid = static_cast<int32_t>(threadIdx.x), block = static_cast<int32_t>(blockIdx.x);
  const int32_t phase_h = static_cast<int32_t>(blockIdx.y), phase_w = static_cast<int32_t>(blockIdx.z);
  const GatherAxis h = g.axis_h(phase_h), w = g.axis_w(phase_w);
  const int32_t rows = g.batch * h.count * w.count, column_tiles = (g.out_c + kColumns - 1) / kColumns;
  const int32_t column0 = block % column_tiles * kColumns;
  const int32_t group = block / column_tiles % g.groups;
  const int32_t row0 = block / column_tiles / g.groups * kRows;
  if (row0 >= rows) return;  // a smaller phase than the one the grid was made for

  const int32_t lane_l = tid % kStep, lane_m = tid / kStep;
  GatherOrigin origin[kRowLoads];
#pragma unroll
  for (int i = 0; i < kRowLoads; ++i) {
    const int32_t m = row0 + lane_m + i * kLoadLanes;
    if (m < rows) origin[i] = g.origin(m, phase_h, phase_w, h, w);
  }
  GatherCursor at;
  if (h.taps > 0 && w.taps > 0) at.advance(lane_l, g.in_c, w.taps);

  Acc acc[kThreadRows][8] = {};
  const int32_t thread_column = tid % (kColumns / 8) * 8, thread_row = tid / (kColumns / 8) * kThreadRows;
  for (int32_t l0 = 0; l0 < h.taps * w.taps * g.in_c; l0 += kStep) {
    load_in<T, kRows, kRowLoads>(in_tile, g, h, w, origin, at, in + group * g.in_c, lane_l, lane_m);
    load_filter<T, kColumns>(filter_tile, g, h, w, at, filter, group, column0, lane_l, lane_m);
    at.advance(kStep, g.in_c, w.taps);
    __syncthreads();
#pragma unroll
    for (int l = 0; l < kStep; ++l) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const Acc a = in_tile[l][thread_row + i];
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] += a * filter_tile[l][thread_column + j];
      }
    }
    __syncthreads();  // the next step overwrites the tiles
  }

  const int32_t column = column0 + thread_column, channel = group * g.out_c + column;
  const int32_t count = min(g.out_c - column, 8);
  if (count <= 0) return;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int32_t m = row0 + thread_row + i;
    if (m >= rows) continue;
    int32_t row_h, row_w;
    const int32_t n = g.decode_row(m, phase_h, phase_w, &row_h, &row_w);
    const int64_t offset = g.out_offset(n, h.out_first + row_h * h.out_step, w.out_first + row_w * w.out_step);
    finish_run<kEpilogueAll>(epilogue, acc[i], offset + channel, channel, count);
  }
}

}  // namespace

Status launch_direct_gather(const Conv2dLaunch& launch) {
  const Gather g = make_gather(launch.op, launch.problem);
  return dispatch_config<std::size(kDirectGatherTiles)>(launch.selection.config, [&](auto config) {
    constexpr Tile tile = kDirectGatherTiles[config.value];
    const int64_t blocks = gather_blocks(g, tile);
    if (blocks > kMaxGridX || g.phases_h > kMaxGridYZ || g.phases_w > kMaxGridYZ) return Status::invalid_argument;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(g.phases_h),
                    static_cast<unsigned>(g.phases_w));
    return dispatch_dtype(launch.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto parameters = epilogue_parameters<T>(launch.epilogue, launch.out(), g.out_c);
      const Status status =
          launch_mask_prepare(launch.epilogue.mask_out, g.out_numel(), parameters.vector, launch.stream);
      if (status != Status::success) return status;
      return FK_LAUNCH(conv2d_direct_gather_kernel<T, tile.rows, tile.columns>, grid, kThreads, 0, launch.stream, g,
                       static_cast<const T*>(launch.in()), static_cast<const T*>(launch.tensors.filter), parameters);
    });
  });
}

}  // namespace freezekit
