// Max pooling in two dimensions: its sizes, and which taps of a window are inside the input.
//
//   y[p, q] = max over taps t = r * kernel_w + s of x[p * stride_h - pad_h + r * dilation_h, the same with s]
//
// Of equal values the first tap wins, of NaNs the last, as in torch. Taps outside the input do not count; a window
// without any gives -infinity.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/host_device.h"

namespace freezekit {

struct Pooling {
  int64_t h, w, p, q;  // sizes of input and output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Taps [first, last) of one axis that fall into the input, for the window that begins at `origin`; empty where none
// does. `first` is a tap of the kernel all the same.
template <class Int>
struct TapRange {
  Int first, last;

  FK_HOST_DEVICE TapRange(Int origin, Int size, Int kernel, Int dilation) {
    const Int before = origin < 0 ? (-origin + dilation - 1) / dilation : 0;
    const Int inside = size > origin ? (size - origin + dilation - 1) / dilation : 0;
    first = before < kernel - 1 ? before : kernel - 1;
    last = inside < kernel ? inside : kernel;
  }
};

// A pooling of n images of c channels, in NHWC or NCHW, whose taps are numbers of 1, 2 or 4 bytes: unsigned in one byte,
// signed in more.
struct MaxPool {
  Pooling window;
  int64_t n = 0, c = 0;
  bool nhwc = true;
  int tap_bytes = 1;
};

// Whether an image's indices, and those of every window, fit 32 bits with room for a sum of two.
inline bool fits_int32(const MaxPool& m) {
  const Pooling& g = m.window;
  const auto is_size = [](int64_t value, int64_t least) { return value >= least && value <= int64_t{1} << 30; };
  for (const int64_t value : {m.n, m.c, g.h, g.w, g.p, g.q, g.pad_h, g.pad_w}) {
    if (!is_size(value, 0)) return false;
  }
  for (const int64_t value : {g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w}) {
    if (!is_size(value, 1)) return false;
  }
  // Factors that passed are at most 2^30, so a product of two does not overflow; a third is added once two have passed.
  return is_size(g.h * g.w, 0) && is_size(g.p * g.q, 0) && is_size(g.h * g.w * m.c, 0) && is_size(g.p * g.q * m.c, 0) &&
         is_size(g.kernel_h * g.kernel_w, 1) && is_size(g.p * g.stride_h + g.pad_h + g.kernel_h * g.dilation_h, 0) &&
         is_size(g.q * g.stride_w + g.pad_w + g.kernel_w * g.dilation_w, 0);
}

}  // namespace freezekit
