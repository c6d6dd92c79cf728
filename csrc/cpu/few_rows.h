// Matrix products with few rows and a large right-hand side, which is read once and as it is.
//
//   products:     y[m, k] += sum over l of a[m, l] * w[k, l]        (a convolution of few positions, w its filter)
//   combinations: d[m, l] += sum over k of dy[m, k] * w[k, l]       (its dgrad)
//
// Libraries copy the right-hand side into a layout of their own first, which at few rows costs more than the product. Here
// a tile of results stays in registers while rows of w stream by; what comes next is asked for in time, since streams end
// and begin too often for the processor to guess. It is asked into the second cache, not the nearest: that can wait for
// too few lines at a time to keep memory busy (0.8 of the time of the whole product and less, on a Zen 4). All arrays are
// dense: a (rows, length), w (channels, length), y and dy (rows, channels), d (rows, length).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace freezekit::cpu {

typedef float Lanes __attribute__((vector_size(32)));  // NOLINT: the attribute goes with typedef alone

FK_INLINE Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
FK_INLINE void store_lanes(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

FK_INLINE float sum_of(Lanes lanes) {
  float v[8];
  std::memcpy(v, &lanes, sizeof(v));
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

FK_INLINE void ask_for(const float* next) { __builtin_prefetch(next, /*rw=*/0, /*locality=*/2); }

struct FewRows {
  int64_t rows, channels, length;
};

// Rows m ... m + kRows - 1 with channels k ... k + kChannels - 1, over `count` of the length.
template <int kRows, int kChannels>
FK_INLINE void products_tile(const FewRows& size, const float* a, const float* w, int64_t count, float* y) {
  Lanes acc[kRows][kChannels] = {};
  int64_t l = 0;
  for (; l + 8 <= count; l += 8) {
    Lanes of_w[kChannels];
    for (int k = 0; k < kChannels; ++k) of_w[k] = load_lanes(w + k * size.length + l);
    if (l % 16 == 0) {
      for (int k = 0; k < kChannels; ++k) ask_for(w + (k + kChannels) * size.length + l);
    }
    for (int m = 0; m < kRows; ++m) {
      const Lanes of_a = load_lanes(a + m * size.length + l);
      for (int k = 0; k < kChannels; ++k) acc[m][k] += of_a * of_w[k];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kChannels; ++k) {
      float sum = sum_of(acc[m][k]);
      for (int64_t i = l; i < count; ++i) sum += a[m * size.length + i] * w[k * size.length + i];
      y[m * size.channels + k] += sum;
    }
  }
}

template <int kRows>
FK_INLINE void products_rows(const FewRows& size, const float* a, const float* w, int64_t count, float* y,
                             int64_t channels) {
  switch (channels) {
    case 1:
      return products_tile<kRows, 1>(size, a, w, count, y);
    case 2:
      return products_tile<kRows, 2>(size, a, w, count, y);
    default:
      return products_tile<kRows, 3>(size, a, w, count, y);
  }
}

// Channels first ... last - 1, the length in chunks: those of `a` stay in the caches.
FK_INLINE void products(const FewRows& size, const float* a, const float* w, float* y, int64_t first, int64_t last) {
  constexpr int64_t kChunk = 512;
  for (int64_t l = 0; l < size.length; l += kChunk) {
    const int64_t count = std::min(kChunk, size.length - l);
    for (int64_t k = first; k < last; k += 3) {
      const int64_t channels = std::min<int64_t>(3, last - k);
      const float* const of_w = w + k * size.length + l;
      int64_t m = 0;
      for (; m + 4 <= size.rows; m += 4) {
        products_rows<4>(size, a + m * size.length + l, of_w, count, y + m * size.channels + k, channels);
      }
      for (; m < size.rows; ++m) {
        products_rows<1>(size, a + m * size.length + l, of_w, count, y + m * size.channels + k, channels);
      }
    }
  }
}

template <int kRows, int kChannels>
FK_INLINE void combinations_tile(const FewRows& size, const float* dy, const float* w, int64_t count, float* d) {
  Lanes factor[kRows][kChannels];
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kChannels; ++k) factor[m][k] = Lanes{} + dy[m * size.channels + k];
  }
  int64_t l = 0;
  for (; l + 8 <= count; l += 8) {
    Lanes acc[kRows];
    for (int m = 0; m < kRows; ++m) acc[m] = load_lanes(d + m * size.length + l);
    for (int k = 0; k < kChannels; ++k) {
      const Lanes of_w = load_lanes(w + k * size.length + l);
      for (int m = 0; m < kRows; ++m) acc[m] += of_w * factor[m][k];
    }
    if (l % 16 == 0) {
      for (int k = 0; k < kChannels; ++k) ask_for(w + (k + kChannels) * size.length + l);
    }
    for (int m = 0; m < kRows; ++m) store_lanes(d + m * size.length + l, acc[m]);
  }
  for (; l < count; ++l) {
    for (int m = 0; m < kRows; ++m) {
      float sum = d[m * size.length + l];
      for (int k = 0; k < kChannels; ++k) sum += dy[m * size.channels + k] * w[k * size.length + l];
      d[m * size.length + l] = sum;
    }
  }
}

template <int kChannels>
FK_INLINE void combinations_rows(const FewRows& size, const float* dy, const float* w, int64_t count, float* d) {
  for (int64_t m = 0; m < size.rows; m += 3) {
    const float* const of_dy = dy + m * size.channels;
    float* const to = d + m * size.length;
    switch (size.rows - m) {
      case 1:
        combinations_tile<1, kChannels>(size, of_dy, w, count, to);
        break;
      case 2:
        combinations_tile<2, kChannels>(size, of_dy, w, count, to);
        break;
      default:
        combinations_tile<3, kChannels>(size, of_dy, w, count, to);
    }
  }
}

// first ... last - 1 of the length, in chunks whose results stay in the nearest cache.
FK_INLINE void combinations(const FewRows& size, const float* dy, const float* w, float* d, int64_t first,
                            int64_t last) {
  const int64_t chunk = std::max<int64_t>(128, 4096 / std::max<int64_t>(size.rows, 1));
  for (int64_t l = first; l < last; l += chunk) {
    const int64_t count = std::min(chunk, last - l);
    int64_t k = 0;
    for (; k + 4 <= size.channels; k += 4) combinations_rows<4>(size, dy + k, w + k * size.length + l, count, d + l);
    for (; k < size.channels; ++k) combinations_rows<1>(size, dy + k, w + k * size.length + l, count, d + l);
  }
}

}  // namespace freezekit::cpu
