// Max pooling (core/pooling.h) on a CPU that remembers the tap: which element of its window each output took.
//
// A plane is one image's channel (NCHW); a pixel is the channels at one place (NHWC).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/pooling.h"
#include "cpu/compute.h"
#include "cpu/simd.h"

namespace freezekit::cpu {

// Where a tap of an output is in its plane, and -1 where it is outside: a table made once a call, since a division
// a tap costs more than the pooling itself. Taps may be any numbers; only places inside the plane come out.
class TapPositions {
 public:
  explicit TapPositions(const Pooling& g) : g_(g), dilated_(g.dilation_h > 1 || g.dilation_w > 1) {
    const int64_t taps = g.kernel_h * g.kernel_w;
    for (int64_t tap = 0; tap < taps; ++tap) {
      rows_.push_back(tap / g.kernel_w * g.dilation_h - g.pad_h);
      columns_.push_back(tap % g.kernel_w * g.dilation_w - g.pad_w);
      offsets_.push_back(rows_.back() * g.w + columns_.back());
    }
    if (taps < 256) offsets_.resize(256, kOutside);  // any byte is an index then
  }

  template <class Tap>
  FK_INLINE int64_t operator()(int64_t p, int64_t q, Tap tap) const {
    if (sizeof(Tap) > 1 && static_cast<uint64_t>(tap) >= offsets_.size()) return -1;
    const int64_t at = p * g_.stride_h * g_.w + q * g_.stride_w + offsets_[static_cast<size_t>(tap)];
    if (static_cast<uint64_t>(at) >= static_cast<uint64_t>(g_.h * g_.w)) return -1;
    // Without dilation every window has a tap inside, which forward took: the check above is for memory's sake alone.
    return !dilated_ || is_inside(p, q, static_cast<size_t>(tap)) ? at : -1;
  }

 private:
  static constexpr int64_t kOutside = std::numeric_limits<int64_t>::min() / 2;

  bool is_inside(int64_t p, int64_t q, size_t tap) const {
    const int64_t i = p * g_.stride_h + rows_[tap], j = q * g_.stride_w + columns_[tap];
    return i >= 0 && i < g_.h && j >= 0 && j < g_.w;
  }

  Pooling g_;
  bool dilated_;
  std::vector<int64_t> rows_, columns_, offsets_;
};

// Without a branch, so that a loop of it becomes vector code.
template <class C>
FK_INLINE bool takes(C value, C best) {
  return (value > best) | (value != value);
}

// The outputs [first, last) of a row for which tap column s is inside the input.
struct OutputRange {
  int64_t first, last;

  OutputRange(const Pooling& g, int64_t s) {
    const int64_t left = s * g.dilation_w - g.pad_w;
    first = left < 0 ? std::min((-left + g.stride_w - 1) / g.stride_w, g.q) : 0;
    last = left < g.w ? std::clamp((g.w - 1 - left) / g.stride_w + 1, first, g.q) : first;
  }
};

// One tap of a row of outputs; kStride is stride_w where that is known, which makes vector loads of neighbours.
template <int64_t kStride, class T, class C>
FK_INLINE void max_pool_tap(const T* line, C* best, int32_t* tap, int32_t here, const OutputRange& outputs,
                            int64_t stride) {
  const int64_t step = kStride > 0 ? kStride : stride;
  for (int64_t q = outputs.first; q < outputs.last; ++q) {
    const C value = up(line[q * step]);
    const bool take = takes(value, best[q]);
    best[q] = pick(take, value, best[q]);
    tap[q] = pick(take, here, tap[q]);
  }
}

// Output row p of a plane; `best` and `tap` hold `q` elements of scratch. Tap by tap rather than output by output: there
// is nothing to predict, and neighbouring outputs are neighbouring lanes (6 to 30 times faster than window by window).
template <class T, class C, class Tap>
FK_INLINE void max_pool_row(const T* x, T* y, Tap* taps, const Pooling& g, int64_t p, C* best, int32_t* tap) {
  const int64_t top = p * g.stride_h - g.pad_h;
  const TapRange<int64_t> rows(top, g.h, g.kernel_h, g.dilation_h);
  std::fill_n(best, g.q, -std::numeric_limits<C>::infinity());
  std::fill_n(tap, g.q, int32_t{0});
  // Before any comparison an output's tap is the first that is inside, so the last to be written here.
  for (int64_t s = g.kernel_w; s-- > 0;) {
    const OutputRange outputs(g, s);
    const int32_t here = static_cast<int32_t>(rows.first * g.kernel_w + s);
    std::fill(tap + outputs.first, tap + outputs.last, here);
  }
  for (int64_t r = rows.first; r < rows.last; ++r) {
    for (int64_t s = 0; s < g.kernel_w; ++s) {
      const T* line = x + (top + r * g.dilation_h) * g.w + s * g.dilation_w - g.pad_w;
      const int32_t here = static_cast<int32_t>(r * g.kernel_w + s);
      const OutputRange outputs(g, s);
      if (g.stride_w == 1) {
        max_pool_tap<1>(line, best, tap, here, outputs, g.stride_w);
      } else if (g.stride_w == 2) {
        max_pool_tap<2>(line, best, tap, here, outputs, g.stride_w);
      } else {
        max_pool_tap<0>(line, best, tap, here, outputs, g.stride_w);
      }
    }
  }
  for (int64_t q = 0; q < g.q; ++q) {
    y[q] = down<T>(best[q]);
    taps[q] = static_cast<Tap>(tap[q]);
  }
}

// The pixels of output row p, image by image in NHWC; `best` and `tap` hold `channels` elements of scratch.
template <class T, class C, class Tap>
FK_INLINE void max_pool_pixels(const T* x, T* y, Tap* taps, const Pooling& g, int64_t p, int64_t channels, C* best,
                               int32_t* tap) {
  const int64_t top = p * g.stride_h - g.pad_h;
  const TapRange<int64_t> rows(top, g.h, g.kernel_h, g.dilation_h);
  for (int64_t q = 0; q < g.q; ++q) {
    const int64_t left = q * g.stride_w - g.pad_w;
    const TapRange<int64_t> columns(left, g.w, g.kernel_w, g.dilation_w);
    std::fill_n(best, channels, -std::numeric_limits<C>::infinity());
    std::fill_n(tap, channels, static_cast<int32_t>(rows.first * g.kernel_w + columns.first));
    for (int64_t r = rows.first; r < rows.last; ++r) {
      for (int64_t s = columns.first; s < columns.last; ++s) {
        const T* pixel = x + ((top + r * g.dilation_h) * g.w + left + s * g.dilation_w) * channels;
        const int32_t here = static_cast<int32_t>(r * g.kernel_w + s);
        for (int64_t c = 0; c < channels; ++c) {
          const C value = up(pixel[c]);
          const bool take = takes(value, best[c]);
          best[c] = pick(take, value, best[c]);
          tap[c] = pick(take, here, tap[c]);
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      y[q * channels + c] = down<T>(best[c]);
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
        if (at >= 0) dx[at * dx_step + c] += up(dy[out + c]);
      }
    }
  }
}

// y[output] = x[position of tap], the transpose of the scatter; 0 where the window has no tap.
template <class T, class Tap>
void max_pool_gather(const T* x, const Tap* taps, T* y, const Pooling& g, const TapPositions& position, int64_t count,
                     int64_t step) {
  for (int64_t p = 0; p < g.p; ++p) {
    for (int64_t q = 0; q < g.q; ++q) {
      const int64_t out = (p * g.q + q) * step;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = position(p, q, taps[out + c]);
        y[out + c] = at >= 0 ? x[at * step + c] : T(0);
      }
    }
  }
}

}  // namespace freezekit::cpu
