// Max pooling (core/pooling.h) on a CPU that remembers the tap: which element of its window each output took.
//
// An input is a volume, or an image, which is a volume of one plane. In NCDHW a volume is one channel's; in NDHWC it is
// all channels', which are neighbours at each place.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/pooling.h"
#include "cpu/compute.h"
#include "cpu/simd.h"

namespace freezekit::cpu {

// Taps are numbered (depth, row, column) as elements of the kernel, the last fastest; those of an image as in Pooling.
struct Pooling3d {
  Pooling plane;
  int64_t d = 1, o = 1;  // depth of input and output
  int64_t kernel_d = 1, stride_d = 1, pad_d = 0, dilation_d = 1;

  int64_t places() const { return d * plane.h * plane.w; }  // of the input
  int64_t rows() const { return o * plane.p; }              // of outputs, q in each
  int64_t taps() const { return kernel_d * plane.kernel_h * plane.kernel_w; }
};

// Row p of plane o of a volume's outputs.
struct OutputRow {
  int64_t o, p;
};

// Where a tap of an output is in its volume, and -1 where it is outside. Taps of one byte are looked up in a table made
// once per call, since three divisions cost more than such a pooling itself. Taps and settings may be any numbers; only places
// inside the volume come out.
class TapPositions {
 public:
  using Place = std::array<int64_t, 3>;

  explicit TapPositions(const Pooling3d& g)
      : g_(g), places_(g.places()), taps_(g.taps()),
        is_dilated_(g.dilation_d > 1 || g.plane.dilation_h > 1 || g.plane.dilation_w > 1) {
    const auto count = static_cast<size_t>(std::clamp<int64_t>(taps_, 0, 256));
    for (size_t tap = 0; tap < count; ++tap) {
      const Place place = first_place(static_cast<int64_t>(tap));
      offsets_[tap] = index(place);
      if (is_dilated_) dilated_.push_back(place);
    }
    std::fill(offsets_.begin() + count, offsets_.end(), std::numeric_limits<int64_t>::min() / 2);  // outside
  }

  // Calls f(i, where the window would begin without padding) for each output, the i-th of its volume.
  template <class F>
  FK_INLINE void for_each_output(const F& f) const {
    int64_t i = 0;
    for (int64_t o = 0; o < g_.o; ++o) {
      for (int64_t p = 0; p < g_.plane.p; ++p) {
        Place origin = {o * g_.stride_d, p * g_.plane.stride_h, 0};
        for (int64_t q = 0; q < g_.plane.q; ++q, origin[2] += g_.plane.stride_w) f(i++, origin);
      }
    }
  }

  template <class Tap>
  FK_INLINE int64_t operator()(const Place& origin, Tap tap) const {
    if constexpr (sizeof(Tap) == 1) {
      const int64_t at = index(origin) + offsets_[tap];
      if (static_cast<uint64_t>(at) >= static_cast<uint64_t>(places_)) return -1;
      // Without dilation every window has a tap inside, which forward took: the check above is for memory's sake alone.
      return !is_dilated_ || (tap < dilated_.size() && is_inside(origin, dilated_[tap])) ? at : -1;
    } else {
      if (tap < 0 || tap >= taps_) return -1;
      const Place first = first_place(tap);
      return is_inside(origin, first) ? index(origin) + index(first) : -1;
    }
  }

 private:
  FK_INLINE int64_t index(const Place& place) const {
    return (place[0] * g_.plane.h + place[1]) * g_.plane.w + place[2];
  }

  // Of the first output.
  Place first_place(int64_t tap) const {
    const Pooling& plane = g_.plane;
    const int64_t line = tap / plane.kernel_w;
    return {line / plane.kernel_h * g_.dilation_d - g_.pad_d, line % plane.kernel_h * plane.dilation_h - plane.pad_h,
            tap % plane.kernel_w * plane.dilation_w - plane.pad_w};
  }

  bool is_inside(const Place& origin, const Place& first) const {
    const Place extents = {g_.d, g_.plane.h, g_.plane.w};
    for (size_t axis = 0; axis < 3; ++axis) {
      const int64_t at = origin[axis] + first[axis];
      if (at < 0 || at >= extents[axis]) return false;
    }
    return true;
  }

  Pooling3d g_;
  int64_t places_, taps_;
  bool is_dilated_;
  std::array<int64_t, 256> offsets_;  // by tap; any byte is an index
  std::vector<Place> dilated_;
};

// Without a branch, so that a loop of it becomes vector code.
template <class C>
FK_INLINE bool takes(C value, C best) {
  return (value > best) | (value != value);
}

// A division takes longer than all else that a window is asked, and dilated ones are rare.
inline TapRange<int64_t> taps_inside(int64_t origin, int64_t size, int64_t kernel, int64_t dilation) {
  return dilation == 1 ? TapRange<int64_t>(origin, size, kernel, 1) : TapRange<int64_t>(origin, size, kernel, dilation);
}

// Tap column s, which is inside the input for the outputs [first, last) of a row.
struct TapColumn {
  int64_t s, first, last;

  TapColumn(const Pooling& g, int64_t s) : s(s) {
    const int64_t left = s * g.dilation_w - g.pad_w;
    first = left < 0 ? std::min((-left + g.stride_w - 1) / g.stride_w, g.q) : 0;
    last = left < g.w ? std::clamp((g.w - 1 - left) / g.stride_w + 1, first, g.q) : first;
  }
};

// What all rows of outputs, q > 0 of them, have in common, and scratch.
template <class C>
struct RowOfOutputs {
  explicit RowOfOutputs(const Pooling& g) : best(g.q), tap(g.q), first_column(g.q) {
    const auto inside = [&](int64_t q) { return taps_inside(q * g.stride_w - g.pad_w, g.w, g.kernel_w, g.dilation_w); };
    for (int64_t q = 0; q < g.q; ++q) first_column[q] = static_cast<int32_t>(inside(q).first);
    // A kernel may be far larger than the input.
    for (int64_t s = first_column.back(); s < inside(0).last; ++s) columns.emplace_back(g, s);
  }

  std::vector<C> best;
  std::vector<int32_t> tap, first_column;
  std::vector<TapColumn> columns;  // those that are inside for any
};

// One tap of a row of outputs; kStride is stride_w where that is known, which makes vector loads of neighbours.
template <int64_t kStride, class T, class C>
FK_INLINE void max_pool_tap(const T* line, C* __restrict best, int32_t* __restrict tap, int32_t here, TapColumn outputs,
                            int64_t stride) {
  const int64_t step = kStride > 0 ? kStride : stride;
  for (int64_t q = outputs.first; q < outputs.last; ++q) {
    const C value = up(line[q * step]);
    const bool take = takes(value, best[q]);
    best[q] = pick(take, value, best[q]);
    tap[q] = pick(take, here, tap[q]);
  }
}

// The taps along depth and height of a row of outputs.
struct WindowRows {
  int64_t front, top;
  TapRange<int64_t> planes, lines;

  WindowRows(const Pooling3d& g, const OutputRow& row)
      : front(row.o * g.stride_d - g.pad_d), top(row.p * g.plane.stride_h - g.plane.pad_h),
        planes(taps_inside(front, g.d, g.kernel_d, g.dilation_d)),
        lines(taps_inside(top, g.plane.h, g.plane.kernel_h, g.plane.dilation_h)) {}
};

// A row of outputs of one channel. Tap by tap rather than output by output: there is nothing to predict, and neighbouring
// outputs are neighbouring lanes (6 to 30 times faster than window by window).
template <class T, class C, class Tap>
FK_INLINE void max_pool_row(const T* x, T* y, Tap* taps, const Pooling3d& g, const OutputRow& row,
                            RowOfOutputs<C>& scratch) {
  const Pooling& plane = g.plane;
  const WindowRows window(g, row);
  C* const best = scratch.best.data();
  int32_t* const tap = scratch.tap.data();
  // A copy: a byte that is stored may be part of anything that is read through a reference.
  const int64_t count = plane.q;
  const int64_t first_line = window.planes.first * plane.kernel_h + window.lines.first;
  const int32_t first = static_cast<int32_t>(first_line * plane.kernel_w);
  for (int64_t q = 0; q < count; ++q) {
    best[q] = -std::numeric_limits<C>::infinity();
    tap[q] = first + scratch.first_column[q];
  }
  for (int64_t t = window.planes.first; t < window.planes.last; ++t) {
    for (int64_t r = window.lines.first; r < window.lines.last; ++r) {
      const int64_t depth = window.front + t * g.dilation_d, height = window.top + r * plane.dilation_h;
      const T* const line = x + (depth * plane.h + height) * plane.w - plane.pad_w;
      for (const TapColumn& column : scratch.columns) {
        const T* const from = line + column.s * plane.dilation_w;
        const int32_t here = static_cast<int32_t>((t * plane.kernel_h + r) * plane.kernel_w + column.s);
        if (plane.stride_w == 1) {
          max_pool_tap<1>(from, best, tap, here, column, plane.stride_w);
        } else if (plane.stride_w == 2) {
          max_pool_tap<2>(from, best, tap, here, column, plane.stride_w);
        } else {
          max_pool_tap<0>(from, best, tap, here, column, plane.stride_w);
        }
      }
    }
  }
  for (int64_t q = 0; q < count; ++q) {
    y[q] = down<T>(best[q]);
    taps[q] = static_cast<Tap>(tap[q]);
  }
}

// A row of outputs of all channels, which are neighbours; `best` and `tap` hold `channels` elements of scratch.
template <class T, class C, class Tap>
FK_INLINE void max_pool_pixels(const T* x, T* y, Tap* taps, const Pooling3d& g, const OutputRow& row, int64_t channels,
                               C* __restrict best, int32_t* __restrict tap) {
  const Pooling plane = g.plane;  // a copy, as above
  const WindowRows window(g, row);
  const int64_t first_line = window.planes.first * plane.kernel_h + window.lines.first;
  for (int64_t q = 0; q < plane.q; ++q) {
    const int64_t left = q * plane.stride_w - plane.pad_w;
    const TapRange<int64_t> columns = taps_inside(left, plane.w, plane.kernel_w, plane.dilation_w);
    std::fill_n(best, channels, -std::numeric_limits<C>::infinity());
    std::fill_n(tap, channels, static_cast<int32_t>(first_line * plane.kernel_w + columns.first));
    for (int64_t t = window.planes.first; t < window.planes.last; ++t) {
      for (int64_t r = window.lines.first; r < window.lines.last; ++r) {
        const int64_t depth = window.front + t * g.dilation_d, height = window.top + r * plane.dilation_h;
        const T* const line = x + ((depth * plane.h + height) * plane.w + left) * channels;
        for (int64_t s = columns.first; s < columns.last; ++s) {
          const T* const pixel = line + s * plane.dilation_w * channels;
          const int32_t here = static_cast<int32_t>((t * plane.kernel_h + r) * plane.kernel_w + s);
          for (int64_t c = 0; c < channels; ++c) {
            const C value = up(pixel[c]);
            const bool take = takes(value, best[c]);
            best[c] = pick(take, value, best[c]);
            tap[c] = pick(take, here, tap[c]);
          }
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      y[q * channels + c] = down<T>(best[c]);
      taps[q * channels + c] = static_cast<Tap>(tap[c]);
    }
  }
}

// The same for one channel, too narrow for a vector: window by window.
template <class C, class T, class Tap>
FK_INLINE void max_pool_windows(const T* x, T* y, Tap* taps, const Pooling3d& g, const OutputRow& row) {
  const Pooling plane = g.plane;  // a copy, as above
  const WindowRows window(g, row);
  const int64_t first_line = window.planes.first * plane.kernel_h + window.lines.first;
  for (int64_t q = 0; q < plane.q; ++q) {
    const int64_t left = q * plane.stride_w - plane.pad_w;
    const TapRange<int64_t> columns = taps_inside(left, plane.w, plane.kernel_w, plane.dilation_w);
    C best = -std::numeric_limits<C>::infinity();
    int64_t tap = first_line * plane.kernel_w + columns.first;
    for (int64_t t = window.planes.first; t < window.planes.last; ++t) {
      for (int64_t r = window.lines.first; r < window.lines.last; ++r) {
        const int64_t depth = window.front + t * g.dilation_d, height = window.top + r * plane.dilation_h;
        const T* const line = x + (depth * plane.h + height) * plane.w + left;
        const int64_t first = (t * plane.kernel_h + r) * plane.kernel_w;
        for (int64_t s = columns.first; s < columns.last; ++s) {
          const C value = up(line[s * plane.dilation_w]);
          if (takes(value, best)) best = value, tap = first + s;
        }
      }
    }
    y[q] = down<T>(best);
    taps[q] = static_cast<Tap>(tap);
  }
}

// dx[position of tap] += dy, over `count` neighbouring channels of one volume. From one place to the next it is `step`
// elements: 1 for a channel's own volume, where count is 1, else the number of channels. dx holds zeros. Each sum is
// rounded to T, and in the order of outputs, as torch's is.
template <class T, class Tap>
void max_pool_scatter(const T* dy, const Tap* taps, T* dx, const TapPositions& position, int64_t count, int64_t step) {
  position.for_each_output([&](int64_t i, const TapPositions::Place& origin) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = position(origin, taps[i * step + c]);
      if (at < 0) continue;
      T& sum = dx[at * step + c];
      sum = down<T>(up(sum) + up(dy[i * step + c]));
    }
  });
}

// y[output] = x[position of tap], the transpose of the scatter; 0 where the window has no tap.
template <class T, class Tap>
void max_pool_gather(const T* x, const Tap* taps, T* y, const TapPositions& position, int64_t count, int64_t step) {
  position.for_each_output([&](int64_t i, const TapPositions::Place& origin) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = position(origin, taps[i * step + c]);
      y[i * step + c] = at >= 0 ? x[at * step + c] : T(0);
    }
  });
}

}  // namespace freezekit::cpu
