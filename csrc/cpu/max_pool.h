// Max pooling on a CPU that remembers the tap: which element of its window each output took.
//
//   y[p, q] = max over taps t = r * kernel_w + s of x[p * stride_h - pad_h + r * dilation_h, the same with s]
//
// Of equal values the first tap wins, of NaNs the last, as in torch. A plane is one image's channel (NCHW); a pixel is
// the channels at one place (NHWC). Taps outside the input do not count; a window without any gives -infinity.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"

namespace freezekit::cpu {

struct Pooling {
  int64_t h, w, p, q;  // sizes of input and output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Where a tap of an output lies in its plane, and -1 where it lies outside: built once a call, since a division a tap
// costs more than the pooling itself.
class TapPositions {
 public:
  explicit TapPositions(const Pooling& g) : g_(g), exact_(g.dilation_h > 1 || g.dilation_w > 1) {
    for (int64_t tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
      rows_.push_back(tap / g.kernel_w * g.dilation_h - g.pad_h);
      columns_.push_back(tap % g.kernel_w * g.dilation_w - g.pad_w);
      offsets_.push_back(rows_.back() * g.w + columns_.back());
    }
  }

  int64_t operator()(int64_t p, int64_t q, int64_t tap) const {
    if (static_cast<uint64_t>(tap) >= offsets_.size()) return -1;
    // Without dilation every window has a tap inside, which forward took: the check is for memory's sake alone.
    const int64_t at = p * g_.stride_h * g_.w + q * g_.stride_w + offsets_[tap];
    if (at < 0 || at >= g_.h * g_.w) return -1;
    if (!exact_) return at;
    const int64_t i = p * g_.stride_h + rows_[tap], j = q * g_.stride_w + columns_[tap];
    return i >= 0 && i < g_.h && j >= 0 && j < g_.w ? at : -1;
  }

 private:
  Pooling g_;
  bool exact_;
  std::vector<int64_t> rows_, columns_, offsets_;
};

// Taps [first, last) of one axis that fall into the input; empty where none does.
struct TapRange {
  int64_t first, last;

  TapRange(int64_t origin, int64_t size, int64_t kernel, int64_t dilation)
      : first(origin < 0 ? std::min((-origin + dilation - 1) / dilation, kernel - 1) : 0),
        last(std::clamp((size - origin + dilation - 1) / dilation, int64_t{0}, kernel)) {}
};

template <class T>
inline bool takes(T value, T best) {
  return value > best || value != value;
}

template <class T, class C, class Tap>
void max_pool_plane(const T* x, T* y, Tap* taps, const Pooling& g) {
  for (int64_t p = 0; p < g.p; ++p) {
    const int64_t top = p * g.stride_h - g.pad_h;
    const TapRange rows(top, g.h, g.kernel_h, g.dilation_h);
    for (int64_t q = 0; q < g.q; ++q) {
      const int64_t left = q * g.stride_w - g.pad_w;
      const TapRange columns(left, g.w, g.kernel_w, g.dilation_w);
      C best = -std::numeric_limits<C>::infinity();
      int64_t tap = rows.first * g.kernel_w + columns.first;
      for (int64_t r = rows.first; r < rows.last; ++r) {
        const T* line = x + (top + r * g.dilation_h) * g.w + left;
        for (int64_t s = columns.first; s < columns.last; ++s) {
          const C value = static_cast<C>(line[s * g.dilation_w]);
          if (takes(value, best)) best = value, tap = r * g.kernel_w + s;
        }
      }
      *y++ = static_cast<T>(best);
      *taps++ = static_cast<Tap>(tap);
    }
  }
}

// The pixels of output row p, image by image in NHWC; `best` and `tap` hold `channels` elements of scratch.
template <class T, class C, class Tap>
FK_INLINE void max_pool_pixels(const T* x, T* y, Tap* taps, const Pooling& g, int64_t p,
                                                           int64_t channels, C* best, int32_t* tap) {
  const int64_t top = p * g.stride_h - g.pad_h;
  const TapRange rows(top, g.h, g.kernel_h, g.dilation_h);
  for (int64_t q = 0; q < g.q; ++q) {
    const int64_t left = q * g.stride_w - g.pad_w;
    const TapRange columns(left, g.w, g.kernel_w, g.dilation_w);
    std::fill_n(best, channels, -std::numeric_limits<C>::infinity());
    std::fill_n(tap, channels, static_cast<int32_t>(rows.first * g.kernel_w + columns.first));
    for (int64_t r = rows.first; r < rows.last; ++r) {
      for (int64_t s = columns.first; s < columns.last; ++s) {
        const T* pixel = x + ((top + r * g.dilation_h) * g.w + left + s * g.dilation_w) * channels;
        const int32_t here = static_cast<int32_t>(r * g.kernel_w + s);
        for (int64_t c = 0; c < channels; ++c) {
          const C value = static_cast<C>(pixel[c]);
          const bool take = takes(value, best[c]);
          best[c] = take ? value : best[c];
          tap[c] = take ? here : tap[c];
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      y[q * channels + c] = static_cast<T>(best[c]);
      taps[q * channels + c] = static_cast<Tap>(tap[c]);
    }
  }
}

// dx[position of tap] += dy, over `count` neighbouring channels of one image. From one place to the next it is `step`
// elements in dy and `dx_step` in dx: 1 for a plane, where count is 1, the number of channels in NHWC. dx holds zeros.
template <class T, class C, class Tap>
void max_pool_scatter(const T* dy, const Tap* taps, C* dx, const Pooling& g, const TapPositions& position,
                      int64_t count, int64_t step, int64_t dx_step) {
  for (int64_t p = 0; p < g.p; ++p) {
    for (int64_t q = 0; q < g.q; ++q) {
      const int64_t out = (p * g.q + q) * step;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = position(p, q, taps[out + c]);
        if (at >= 0) dx[at * dx_step + c] += static_cast<C>(dy[out + c]);
      }
    }
  }
}

// y[output] = x[position of tap], the transpose of the scatter; 0 where the window has no tap.
template <class T, class Tap>
void max_pool_gather(const T* x, const Tap* taps, T* y, const Pooling& g, const TapPositions& position,
                     int64_t count, int64_t step) {
  for (int64_t p = 0; p < g.p; ++p) {
    for (int64_t q = 0; q < g.q; ++q) {
      const int64_t out = (p * g.q + q) * step;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = position(p, q, static_cast<int64_t>(taps[out + c]));
        y[out + c] = at >= 0 ? x[at * step + c] : T(0);
      }
    }
  }
}

}  // namespace freezekit::cpu
