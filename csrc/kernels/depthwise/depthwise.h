// What the tiled depthwise kernels share: one channel per group (multiplier 1), filters of 3, 5 or 7, stride 1 or 2.
//
// A block takes kChannels channels (64 bytes of a position) of a tile of positions. The tile of the input with its halo
// comes to shared memory once, by cp.async, so that memory is read once but for the halo:
//
//   stride | output tile | input read per output, filter 3 / 5 / 7, against stride^2
//   1      | 16 x 16     | 1.27 / 1.56 / 1.89
//   2      |  8 x 16     | 1.10 / 1.30 / 1.52
//
// Channels must be a multiple of 8 and pointers 16-byte aligned; depthwise_generic.cu takes the rest.
#pragma once

#include "core/gather.h"
#include "kernels/families.h"
#include "kernels/numeric.h"
#include "kernels/ptx.h"

namespace freezekit {

constexpr int kPositionBytes = 64;  // of shared memory: 32 channels of 16 bits, 16 of 32

// Sizes of the gathered tensor (in) and of the one whose positions are tiled (out).
struct DepthwiseShape {
  int32_t batch = 0, channels = 0;
  int32_t in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int32_t pad_h = 0, pad_w = 0;  // input position = output position * stride - pad + tap

  FK_HOST_DEVICE int64_t in_offset(int32_t n, int32_t ih, int32_t iw) const {
    return ((static_cast<int64_t>(n) * in_h + ih) * in_w + iw) * channels;
  }
  FK_HOST_DEVICE int64_t out_offset(int32_t n, int32_t oh, int32_t ow) const {
    return ((static_cast<int64_t>(n) * out_h + oh) * out_w + ow) * channels;
  }
};

// The rectangle of positions of one image that is kept in shared memory. Rows start so that reads of neighbouring
// rows (stride 1) or of every other one (stride 2) fall into different halves of the 32 banks.
template <class T, int kHeightOfPatch, int kWidthOfPatch, int kStride>
struct DepthwisePatch {
  static constexpr int kHeight = kHeightOfPatch, kWidth = kWidthOfPatch;
  static constexpr int kChannels = kPositionBytes / static_cast<int>(sizeof(T));
  static_assert(kChannels <= kDepthwiseChannels);
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPitch = kStride == 1 ? (kWidth | 1) * kPositionBytes : kWidth * kPositionBytes + 32;
  static constexpr int kBytes = kHeight * kPitch;

  FK_DEVICE static unsigned char* at(unsigned char* patch, int32_t row, int32_t column, int32_t channel) {
    return patch + row * kPitch + column * kPositionBytes + channel * static_cast<int32_t>(sizeof(T));
  }

  // Starts copying positions (ih0 + row, iw0 + column) of image n, channels from channel0 on; zeros outside.
  template <int kThreads>
  FK_DEVICE static void load(unsigned char* patch, const T* image, int32_t height, int32_t width, int32_t channels,
                             int32_t ih0, int32_t iw0, int32_t channel0) {
    constexpr int kChunksOfPosition = kPositionBytes / 16;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kHeight * kWidth * kChunksOfPosition; i += kThreads) {
      const int32_t channel = i % kChunksOfPosition * kChunk, position = i / kChunksOfPosition;
      const int32_t row = position / kWidth, column = position % kWidth, ih = ih0 + row, iw = iw0 + column;
      const bool inside = ih >= 0 && ih < height && iw >= 0 && iw < width && channel0 + channel < channels;
      const int64_t offset = static_cast<int64_t>(ih * width + iw) * channels + channel0 + channel;
      ptx::cp_async<16>(at(patch, row, column, channel), inside ? image + offset : image, inside);
    }
  }
};

// Eight channels of a position from shared memory, as floats.
template <class T>
FK_DEVICE void load_patch(const unsigned char* from, float (&values)[8]) {
  constexpr int pieces = static_cast<int>(sizeof(T)) / 2;
  T raw[8];
  uint4 bytes[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) bytes[i] = reinterpret_cast<const uint4*>(from)[i];
  memcpy(raw, bytes, sizeof raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = cast<float>(raw[i]);
}

// f(std::integral_constant) of the filter size and of the stride of a tiled problem.
template <class F>
Status dispatch_depthwise(const Conv2dProblem& p, const F& f) {
  const auto with_size = [&](auto stride) {
    switch (p.r) {
      case 3:
        return f(std::integral_constant<int, 3>(), stride);
      case 5:
        return f(std::integral_constant<int, 5>(), stride);
      default:
        return f(std::integral_constant<int, 7>(), stride);
    }
  };
  return p.stride_h == 1 ? with_size(std::integral_constant<int, 1>()) : with_size(std::integral_constant<int, 2>());
}

}  // namespace freezekit
