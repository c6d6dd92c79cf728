// Max pooling in two dimensions: its sizes, and which taps of a window lie inside the input.
//
//   y[p, q] = max over taps t = r * kernel_w + s of x[p * stride_h - pad_h + r * dilation_h, the same with s]
//
// Of equal values the first tap wins, of NaNs the last, as in torch. Taps outside the input do not count; a window
// without any gives -infinity.
#pragma once

#include <cstdint>

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

}  // namespace freezekit
