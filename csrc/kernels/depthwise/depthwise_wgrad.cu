// Depthwise wgrad, tiled (depthwise.h): x and dy are read once, sums stay in registers until the end; deterministic.
//
//   dw[c, r, s] = sum over n, p, q of dy[n, p, q, c] * x[n, p * stride - pad + r, q * stride - pad + s, c]
//
// Layouts: x, dy NHWC, dw C x R x S; C a multiple of 8, 16-byte alignment.
//
// A block walks the tiles of its slice (blockIdx.y) for 64 bytes of channels. Its threads are 8 lanes of rows times
// pairs of channels; each keeps all taps of its pair. The lanes are added in order through shared memory, partial sums
// [slice][dw] stay in fp32.
#include "kernels/depthwise/depthwise.h"

namespace freezekit {
namespace {

constexpr int kRowLanes = 8;
constexpr int kTileColumns = kDepthwiseTile;

template <class T, int kSize, int kStride>
struct WgradTile {
  static constexpr int kRows = kDepthwiseTile / kStride;
  using X = DepthwisePatch<T, (kRows - 1) * kStride + kSize, (kTileColumns - 1) * kStride + kSize, kStride>;
  using Dy = DepthwisePatch<T, kRows, kTileColumns, 1>;
  static constexpr int kPairs = X::kChannels / 2, kThreads = kPairs * kRowLanes;
  // Registers for the taps of a pair: with more blocks asked for ptxas spills, left to itself it asks for more.
  static constexpr int kMinBlocks = kSize == 3 ? 4 : kSize == 5 ? 3 : 2;
  static constexpr int kReduceBytes = kRowLanes * kSize * X::kChannels * 4;
  static constexpr int kSharedBytes = X::kBytes + Dy::kBytes > kReduceBytes ? X::kBytes + Dy::kBytes : kReduceBytes;
};

template <class T>
FK_DEVICE float2 load_pair(const unsigned char* from) {
  if constexpr (std::is_same_v<T, float>) {
    return *reinterpret_cast<const float2*>(from);
  } else {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
    T values[2];
    memcpy(values, &raw, sizeof values);
    return make_float2(cast<float>(values[0]), cast<float>(values[1]));
  }
}

// Adds one tile to acc[r][s][channel of the pair]. Positions past the output take no part: what x holds there, an
// infinity say, must not meet the zero that stands for dy.
template <class T, int kSize, int kStride>
FK_DEVICE void add_tile(float (&acc)[kSize][kSize][2], unsigned char* x, unsigned char* dy, int32_t rows,
                        int32_t columns, int32_t lane, int32_t channel) {
  using Tile = WgradTile<T, kSize, kStride>;
#pragma unroll 1
  for (int32_t row = lane; row < rows; row += kRowLanes) {
#pragma unroll 4  // what neighbouring q share of x is read once, and the registers still suffice
    for (int32_t q = 0; q < columns; ++q) {
      const float2 d = load_pair<T>(Tile::Dy::at(dy, row, q, channel));
#pragma unroll
      for (int r = 0; r < kSize; ++r) {
#pragma unroll
        for (int s = 0; s < kSize; ++s) {
          const float2 v = load_pair<T>(Tile::X::at(x, row * kStride + r, q * kStride + s, channel));
          acc[r][s][0] += d.x * v.x;
          acc[r][s][1] += d.y * v.y;
        }
      }
    }
  }
}

template <class T, int kSize, int kStride>
__global__ void __launch_bounds__(WgradTile<T, kSize, kStride>::kThreads, WgradTile<T, kSize, kStride>::kMinBlocks)
    depthwise_wgrad_kernel(const DepthwiseShape shape, int32_t tiles_per_slice, const T* __restrict__ dy,
                           const T* __restrict__ x, float* __restrict__ partial) {
  using Tile = WgradTile<T, kSize, kStride>;
  using X = typename Tile::X;
  using Dy = typename Tile::Dy;
  FK_DYNAMIC_SHARED(shared);
  unsigned char* const dy_patch = shared + X::kBytes;
  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  const int32_t channel = tid % Tile::kPairs * 2, lane = tid / Tile::kPairs;
  const int32_t channel0 = static_cast<int32_t>(blockIdx.x) * X::kChannels;
  const int32_t tiles_w = (shape.out_w + kTileColumns - 1) / kTileColumns;
  const int32_t tiles_h = (shape.out_h + Tile::kRows - 1) / Tile::kRows;
  const int32_t begin = static_cast<int32_t>(blockIdx.y) * tiles_per_slice;
  const int32_t end = min(begin + tiles_per_slice, tiles_w * tiles_h * shape.batch);

  float acc[kSize][kSize][2] = {};
  for (int32_t tile = begin; tile < end; ++tile) {
    const int32_t q0 = tile % tiles_w * kTileColumns, p0 = tile / tiles_w % tiles_h * Tile::kRows;
    const int32_t n = tile / tiles_w / tiles_h;
    X::template load<Tile::kThreads>(shared, x + shape.in_offset(n, 0, 0), shape.in_h, shape.in_w, shape.channels,
                                     p0 * kStride - shape.pad_h, q0 * kStride - shape.pad_w, channel0);
    Dy::template load<Tile::kThreads>(dy_patch, dy + shape.out_offset(n, 0, 0), shape.out_h, shape.out_w,
                                      shape.channels, p0, q0, channel0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    add_tile<T, kSize, kStride>(acc, shared, dy_patch, min(Tile::kRows, shape.out_h - p0),
                                min(kTileColumns, shape.out_w - q0), lane, channel);
    __syncthreads();  // the next tile, or the sums below, overwrite the patches
  }

  float* const sums = reinterpret_cast<float*>(shared);  // [lane][s][channel], one row of the filter at a time
  float* const out = partial + static_cast<int64_t>(blockIdx.y) * shape.channels * (kSize * kSize);
#pragma unroll
  for (int r = 0; r < kSize; ++r) {
#pragma unroll
    for (int s = 0; s < kSize; ++s) {
      float* const to = sums + (lane * kSize + s) * X::kChannels + channel;
      to[0] = acc[r][s][0], to[1] = acc[r][s][1];
    }
    __syncthreads();
    for (int32_t i = tid; i < kSize * X::kChannels; i += Tile::kThreads) {
      const int32_t c = i % X::kChannels, s = i / X::kChannels;
      if (channel0 + c >= shape.channels) continue;
      float sum = 0;
      for (int32_t l = 0; l < kRowLanes; ++l) sum += sums[l * kSize * X::kChannels + i];
      store_global(out + static_cast<int64_t>(channel0 + c) * (kSize * kSize) + r * kSize + s, sum);
    }
    __syncthreads();  // the next row overwrites the sums
  }
}

}  // namespace

Status launch_depthwise_wgrad(const Conv2dLaunch& launch) {
  const Conv2dProblem& p = launch.problem;
  const Conv2dTensors& tensors = launch.tensors;
  if (!depthwise_is_tiled(p, launch.dtype) || !is_aligned_16(tensors.x) || !is_aligned_16(tensors.y)) {
    return Status::invalid_argument;
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const DepthwiseShape shape = {narrow(p.n), narrow(p.c), narrow(p.h),     narrow(p.w),
                                narrow(p.p), narrow(p.q), narrow(p.pad_h), narrow(p.pad_w)};
  return dispatch_short_dtype(launch.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_depthwise(p, [&](auto size, auto stride) {
      using Tile = WgradTile<T, size.value, stride.value>;
      const int split_k = launch.selection.split_k;
      const int64_t tiles = ceil_div(p.p, Tile::kRows) * ceil_div(p.q, kTileColumns) * p.n;
      const dim3 grid(static_cast<unsigned>(ceil_div(p.c, Tile::X::kChannels)), static_cast<unsigned>(split_k));
      return FK_LAUNCH(depthwise_wgrad_kernel<T, size.value, stride.value>, grid, dim3(Tile::kThreads),
                       Tile::kSharedBytes, launch.stream, shape, narrow(ceil_div(tiles, split_k)),
                       static_cast<const T*>(tensors.y), static_cast<const T*>(tensors.x),
                       static_cast<float*>(launch.workspace));
    });
  });
}

}  // namespace freezekit
