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
#include "core/gather.h"
#include "kernels/epilogue.h"
#include "kernels/families.h"

namespace freezekit {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = 8;                      // along the reduction
constexpr int kLoadLanes = kThreads / kStep;  // rows or columns that are loaded at once

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_gather_kernel(const Gather g, const T* __restrict__ in, const T* __restrict__ filter,
                                const EpilogueParameters<T> epilogue) {
  using Acc = Accumulator<T>;
  constexpr int kThreadRows = kRows * kColumns / (kThreads * 8);
  constexpr int kRowLoads = kRows / kLoadLanes;
  constexpr int kColumnLoads = kColumns > kLoadLanes ? kColumns / kLoadLanes : 1;
  FK_SHARED(Acc, in_tile, [kStep][kRows + 4]);
  FK_SHARED(Acc, filter_tile, [kStep][kColumns + 4]);

  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  const int32_t phase_h = static_cast<int32_t>(blockIdx.y), phase_w = static_cast<int32_t>(blockIdx.z);
  const GatherAxis h = g.axis_h(phase_h), w = g.axis_w(phase_w);
  const int32_t rows = g.batch * h.count * w.count;
  const int32_t column_tiles = (g.out_c + kColumns - 1) / kColumns;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
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
  const int64_t in_channels = static_cast<int64_t>(g.in_c) * g.groups;
  const int32_t in_channel0 = group * g.in_c;
  const int64_t out_channel0 = static_cast<int64_t>(group) * g.out_c;

  Acc acc[kThreadRows][8] = {};
  const int32_t thread_column = tid % (kColumns / 8) * 8, thread_row = tid / (kColumns / 8) * kThreadRows;
  GatherCursor at;
  if (h.taps > 0 && w.taps > 0) at.advance(lane_l, g.in_c, w.taps);
  const int32_t reduction = h.taps * w.taps * g.in_c;
  for (int32_t l0 = 0; l0 < reduction; l0 += kStep) {
    const bool inside = at.tap_h < h.taps;
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int32_t ih = origin[i].ih + at.tap_h * h.in_step, iw = origin[i].iw + at.tap_w * w.in_step;
      Acc value = 0;
      if (inside && ih >= 0 && ih < g.in_h && iw >= 0 && iw < g.in_w) {
        const int64_t position = origin[i].image + ih * g.in_w + iw;
        value = cast<Acc>(load_global(in + position * in_channels + in_channel0 + at.channel));
      }
      in_tile[lane_l][lane_m + i * kLoadLanes] = value;
    }
    const int32_t filter_h = h.filter_first + at.tap_h * h.filter_step;
    const int32_t filter_w = w.filter_first + at.tap_w * w.filter_step;
    const int64_t filter_taps = static_cast<int64_t>(g.h.taps) * g.w.taps, tap = filter_h * g.w.taps + filter_w;
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int32_t column = lane_m + i * kLoadLanes, j = column0 + column;
      if (column >= kColumns) continue;
      Acc value = 0;
      if (inside && j < g.out_c) {
        const int64_t offset =
            g.transposed ? ((static_cast<int64_t>(in_channel0) + at.channel) * filter_taps + tap) * g.out_c + j
                         : ((out_channel0 + j) * filter_taps + tap) * g.in_c + at.channel;
        value = cast<Acc>(load_global(filter + offset));
      }
      filter_tile[lane_l][column] = value;
    }
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

  const int32_t column = column0 + thread_column;
  const int32_t count = g.out_c - column < 8 ? g.out_c - column : 8;
  if (count <= 0) return;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int32_t m = row0 + thread_row + i;
    if (m >= rows) continue;
    int32_t row_h, row_w;
    const int32_t n = g.decode_row(m, phase_h, phase_w, &row_h, &row_w);
    const int64_t offset =
        g.out_offset(n, h.out_first + row_h * h.out_step, w.out_first + row_w * w.out_step) + out_channel0 + column;
    finish_run<kEpilogueAll>(epilogue, acc[i], offset, static_cast<int32_t>(out_channel0) + column, count);
  }
}

}  // namespace

Status launch_direct_gather(int config, const Gather& g, DType dtype, const void* in, const void* filter, void* out,
                            const Epilogue& epilogue, Stream stream) {
  if (config < 0 || config > 1) return Status::invalid_argument;
  const int64_t blocks = gather_blocks(g, kDirectGatherTiles[config]);
  if (blocks > kMaxGridX || g.phases_h > kMaxGridYZ || g.phases_w > kMaxGridYZ) return Status::invalid_argument;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(g.phases_h), static_cast<unsigned>(g.phases_w));
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto parameters = epilogue_parameters<T>(epilogue, out, g.out_c);
    if (epilogue.mask_out) {
      const int64_t numel = static_cast<int64_t>(g.batch) * g.out_h * g.out_w * g.out_c * g.groups;
      const Status status = launch_mask_prepare(epilogue.mask_out, numel, parameters.vector, stream);
      if (status != Status::success) return status;
    }
    constexpr Tile wide = kDirectGatherTiles[0], narrow = kDirectGatherTiles[1];
    const auto kernel = config == 0 ? conv2d_direct_gather_kernel<T, wide.rows, wide.columns>
                                    : conv2d_direct_gather_kernel<T, narrow.rows, narrow.columns>;
    return FK_LAUNCH(kernel, grid, kThreads, 0, stream, g, static_cast<const T*>(in), static_cast<const T*>(filter),
                     parameters);
  });
}

}  // namespace freezekit
