// Depthwise fprop and dgrad, tiled (depthwise.h): one pass over memory, sums in registers.
//
//   fprop:            y[n, p, q, c] = epilogue(sum over r, s of x[n, p * stride - pad + r, ..., c] * f[c, r, s])
//   dgrad, stride 1:  the same of dy, with the filter rotated and padding size - 1 - pad
//   dgrad, stride 2:  dx[n, h, w, c] = epilogue(sum over r, s of dy[n, (h + pad - r) / 2, ..., c] * f[c, r, s]),
//                     over the r and s for which the division is exact
//
// Layouts: x, y NHWC, filter KRSC with one channel per group, that is C x R x S; C a multiple of 8, 16-byte alignment.
// A thread makes a strip of kStrip outputs along a row, for eight channels: it reads each input of a filter row once
// from shared memory and adds it to every output that it belongs to.
#include "kernels/depthwise/depthwise.h"
#include "kernels/epilogue.h"

namespace freezekit {
namespace {

constexpr int kStrips = 32;  // of a block

// Places of one thread: which eight channels of the block's, which row and first column of the tile.
template <int kRows, int kStrip, int kGroups>
struct Place {
  int32_t channel, row, column;
  FK_DEVICE Place() {
    const int32_t tid = static_cast<int32_t>(threadIdx.x), strip = tid / kGroups;
    channel = tid % kGroups * 8, row = strip % kRows, column = strip / kRows * kStrip;
  }
};

// A block's tile: image n, tile row and column, first channel.
struct Block {
  int32_t channel0, tile_h, tile_w, n;
  FK_DEVICE Block(int32_t channel_blocks, int32_t channels, int32_t tiles_h, int32_t tiles_w) {
    int32_t block = static_cast<int32_t>(blockIdx.x);
    channel0 = block % channel_blocks * channels, block /= channel_blocks;
    tile_w = block % tiles_w, block /= tiles_w;
    tile_h = block % tiles_h, n = block / tiles_h;
  }
};

// The filters of the block's channels as floats [tap][channel], rotated by 180 degrees if asked.
template <class T, int kSize, int kChannels, int kThreads>
FK_DEVICE void load_filter(float* to, const T* filter, int32_t channel0, int32_t channels, bool rotated) {
  constexpr int kTaps = kSize * kSize;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kTaps * kChannels; i += kThreads) {
    const int32_t channel = i / kTaps, tap = i % kTaps;
    const bool inside = channel0 + channel < channels;
    const float value =
        inside ? cast<float>(load_global(filter + static_cast<int64_t>(channel0 + channel) * kTaps + tap)) : 0.0f;
    to[(rotated ? kTaps - 1 - tap : tap) * kChannels + channel] = value;
  }
}

template <int kSize, int kChannels>
FK_DEVICE void load_filter_row(float (&taps)[kSize][8], const float* filter, int32_t row, int32_t channel) {
  const float* const from = filter + row * kSize * kChannels + channel;
#pragma unroll
  for (int s = 0; s < kSize; ++s) {
    load_patch<float>(reinterpret_cast<const unsigned char*>(from + s * kChannels), taps[s]);
  }
}

template <class T, int kStrip>
FK_DEVICE void finish_strip(float (&acc)[kStrip][8], const EpilogueParameters<T>& epilogue, const DepthwiseShape& shape,
                            int32_t n, int32_t oh, int32_t ow, int32_t channel) {
  if (oh < 0 || oh >= shape.out_h || channel >= shape.channels) return;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (ow + i < 0 || ow + i >= shape.out_w) continue;
    finish_run<kEpilogueAll | kEpilogueVector>(epilogue, acc[i], shape.out_offset(n, oh, ow + i) + channel, channel, 8);
  }
}

template <class T, int kSize, int kStride>
struct ForwardTile {
  static constexpr int kRows = kDepthwiseTile / kStride, kColumns = kDepthwiseTile, kStrip = kRows * kColumns / kStrips;
  using Patch = DepthwisePatch<T, (kRows - 1) * kStride + kSize, (kColumns - 1) * kStride + kSize, kStride>;
  static constexpr int kGroups = Patch::kChannels / 8, kThreads = kStrips * kGroups;
  static constexpr int kSharedBytes = Patch::kBytes + kSize * kSize * Patch::kChannels * 4;
};

template <class T, int kSize, int kStride>
__global__ void __launch_bounds__(ForwardTile<T, kSize, kStride>::kThreads)
    depthwise_forward_kernel(const DepthwiseShape shape, bool rotated, const T* __restrict__ in,
                             const T* __restrict__ filter, const EpilogueParameters<T> epilogue) {
  using Tile = ForwardTile<T, kSize, kStride>;
  using Patch = typename Tile::Patch;
  FK_DYNAMIC_SHARED(patch);
  float* const taps = reinterpret_cast<float*>(patch + Patch::kBytes);
  const Block block((shape.channels + Patch::kChannels - 1) / Patch::kChannels, Patch::kChannels,
                    (shape.out_h + Tile::kRows - 1) / Tile::kRows, (shape.out_w + Tile::kColumns - 1) / Tile::kColumns);
  const int32_t oh0 = block.tile_h * Tile::kRows, ow0 = block.tile_w * Tile::kColumns;
  Patch::template load<Tile::kThreads>(patch, in + shape.in_offset(block.n, 0, 0), shape.in_h, shape.in_w,
                                       shape.channels, oh0 * kStride - shape.pad_h, ow0 * kStride - shape.pad_w,
                                       block.channel0);
  ptx::cp_async_commit();
  load_filter<T, kSize, Patch::kChannels, Tile::kThreads>(taps, filter, block.channel0, shape.channels, rotated);
  ptx::cp_async_wait<0>();
  __syncthreads();

  const Place<Tile::kRows, Tile::kStrip, Tile::kGroups> at;
  float acc[Tile::kStrip][8] = {};
#pragma unroll 1
  for (int32_t r = 0; r < kSize; ++r) {
    float filter_row[kSize][8];
    load_filter_row<kSize, Patch::kChannels>(filter_row, taps, r, at.channel);
#pragma unroll
    for (int u = 0; u < (Tile::kStrip - 1) * kStride + kSize; ++u) {
      float value[8];
      load_patch<T>(Patch::at(patch, at.row * kStride + r, at.column * kStride + u, at.channel), value);
#pragma unroll
      for (int i = 0; i < Tile::kStrip; ++i) {
        const int s = u - i * kStride;
        if (s < 0 || s >= kSize) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i][e] += value[e] * filter_row[s][e];
      }
    }
  }
  finish_strip<T, Tile::kStrip>(acc, epilogue, shape, block.n, oh0 + at.row, ow0 + at.column,
                                block.channel0 + at.channel);
}

// Stride 2 dgrad. Tiles begin where h + pad and w + pad are even, so that output i of a strip meets the taps s of
// i's own parity: at column u of the patch, s = i - 2 u + size - 1.
template <class T, int kSize>
struct BackwardTile {
  static constexpr int kRows = kDepthwiseTile, kColumns = kDepthwiseTile, kStrip = 8, kHalo = (kSize - 1) / 2;
  using Patch = DepthwisePatch<T, kRows / 2 + kHalo, kColumns / 2 + kHalo, 1>;
  static constexpr int kGroups = Patch::kChannels / 8, kThreads = kStrips * kGroups;
  static constexpr int kSharedBytes = Patch::kBytes + kSize * kSize * Patch::kChannels * 4;
};

template <class T, int kSize>
__global__ void __launch_bounds__(BackwardTile<T, kSize>::kThreads)
    depthwise_dgrad_stride2_kernel(const DepthwiseShape shape, const T* __restrict__ dy, const T* __restrict__ filter,
                                   const EpilogueParameters<T> epilogue) {
  using Tile = BackwardTile<T, kSize>;
  using Patch = typename Tile::Patch;
  FK_DYNAMIC_SHARED(patch);
  float* const taps = reinterpret_cast<float*>(patch + Patch::kBytes);
  const int32_t odd_h = shape.pad_h & 1, odd_w = shape.pad_w & 1;  // positions that are before the tensor
  const Block block((shape.channels + Patch::kChannels - 1) / Patch::kChannels, Patch::kChannels,
                    (shape.out_h + odd_h + Tile::kRows - 1) / Tile::kRows,
                    (shape.out_w + odd_w + Tile::kColumns - 1) / Tile::kColumns);
  const int32_t h0 = block.tile_h * Tile::kRows - odd_h, w0 = block.tile_w * Tile::kColumns - odd_w;
  Patch::template load<Tile::kThreads>(patch, dy + shape.in_offset(block.n, 0, 0), shape.in_h, shape.in_w,
                                       shape.channels, (h0 + shape.pad_h) / 2 - Tile::kHalo,
                                       (w0 + shape.pad_w) / 2 - Tile::kHalo, block.channel0);
  ptx::cp_async_commit();
  load_filter<T, kSize, Patch::kChannels, Tile::kThreads>(taps, filter, block.channel0, shape.channels, false);
  ptx::cp_async_wait<0>();
  __syncthreads();

  const Place<Tile::kRows, Tile::kStrip, Tile::kGroups> at;
  float acc[Tile::kStrip][8] = {};
#pragma unroll 1
  for (int32_t r = at.row & 1; r < kSize; r += 2) {
    float filter_row[kSize][8];
    load_filter_row<kSize, Patch::kChannels>(filter_row, taps, r, at.channel);
#pragma unroll
    for (int u = 0; u < Tile::kStrip / 2 + Tile::kHalo; ++u) {
      float value[8];
      load_patch<T>(Patch::at(patch, (at.row - r) / 2 + Tile::kHalo, at.column / 2 + u, at.channel), value);
#pragma unroll
      for (int i = 0; i < Tile::kStrip; ++i) {
        const int s = i - 2 * u + kSize - 1;
        if (s < 0 || s >= kSize) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i][e] += value[e] * filter_row[s][e];
      }
    }
  }
  finish_strip<T, Tile::kStrip>(acc, epilogue, shape, block.n, h0 + at.row, w0 + at.column,
                                block.channel0 + at.channel);
}

int64_t blocks_of(const DepthwiseShape& shape, int32_t rows, int32_t columns, int32_t channels, int32_t before_h,
                  int32_t before_w) {
  return ceil_div(shape.channels, channels) * ceil_div(shape.out_h + before_h, rows) *
         ceil_div(shape.out_w + before_w, columns) * shape.batch;
}

template <class T, int kSize, int kStride>
Status launch_tile(const Conv2dLaunch& launch, const DepthwiseShape& shape, const EpilogueParameters<T>& epilogue) {
  const T* const in = static_cast<const T*>(launch.in());
  const T* const filter = static_cast<const T*>(launch.tensors.filter);
  const bool dgrad = launch.op == Operator::dgrad;
  if constexpr (kStride == 2) {
    if (dgrad) {
      using Tile = BackwardTile<T, kSize>;
      const int64_t blocks =
          blocks_of(shape, Tile::kRows, Tile::kColumns, Tile::Patch::kChannels, shape.pad_h & 1, shape.pad_w & 1);
      if (blocks > kMaxGridX) return Status::invalid_argument;
      return FK_LAUNCH(depthwise_dgrad_stride2_kernel<T, kSize>, dim3(static_cast<unsigned>(blocks)),
                       dim3(Tile::kThreads), Tile::kSharedBytes, launch.stream, shape, in, filter, epilogue);
    }
  }
  using Tile = ForwardTile<T, kSize, kStride>;
  const int64_t blocks = blocks_of(shape, Tile::kRows, Tile::kColumns, Tile::Patch::kChannels, 0, 0);
  if (blocks > kMaxGridX) return Status::invalid_argument;
  return FK_LAUNCH(depthwise_forward_kernel<T, kSize, kStride>, dim3(static_cast<unsigned>(blocks)),
                   dim3(Tile::kThreads), Tile::kSharedBytes, launch.stream, shape, dgrad, in, filter, epilogue);
}

}  // namespace

Status launch_depthwise_gather(const Conv2dLaunch& launch) {
  const Conv2dProblem& p = launch.problem;
  if (!depthwise_is_tiled(p, launch.dtype) || !is_aligned_16(launch.in())) return Status::invalid_argument;
  const Gather g = make_gather(launch.op, p);
  DepthwiseShape shape = {g.batch, static_cast<int32_t>(p.c), g.in_h, g.in_w, g.out_h, g.out_w, g.h.pad, g.w.pad};
  if (launch.op == Operator::dgrad && p.stride_h == 1) {
    shape.pad_h = g.h.taps - 1 - g.h.pad, shape.pad_w = g.w.taps - 1 - g.w.pad;
  }
  return dispatch_short_dtype(launch.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto parameters = epilogue_parameters<T>(launch.epilogue, launch.out(), p.c);
    if (!parameters.vector) return Status::invalid_argument;
    const Status status =
        launch_mask_prepare(launch.epilogue.mask_out, g.out_numel(), parameters.vector, launch.stream);
    if (status != Status::success) return status;
    return dispatch_depthwise(
        p, [&](auto size, auto stride) { return launch_tile<T, size.value, stride.value>(launch, shape, parameters); });
  });
}

}  // namespace freezekit
