// x * scale + shift, rounded once, as the machine code of torch's group and batch norms rounds it; and whether that is y,
// to the bit.
//
// In rows of contiguous elements: of one channel each, with one scale and one shift (NCHW), or of all channels (NHWC). Rows
// may be short: a call takes many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/compute.h"

namespace freezekit::cpu {

template <class T>
FK_INLINE T affine(T x, Compute<T> scale, Compute<T> shift) {
  return down<T>(std::fma(up(x), scale, shift));
}

// The scales and shifts of a row: one of each, or one for each element.
template <class C>
struct One {
  C scale, shift;
  FK_INLINE One(C scale, C shift) : scale(scale), shift(shift) {}
  FK_INLINE One(const C* scales, const C* shifts) : One(*scales, *shifts) {}
  FK_INLINE One at(int64_t) const { return *this; }
};
template <class C>
struct Each {
  const C* __restrict scale, * __restrict shift;
  FK_INLINE Each(const C* scales, const C* shifts) : scale(scales), shift(shifts) {}
  FK_INLINE One<C> at(int64_t i) const { return {scale[i], shift[i]}; }
};

template <class T, class Channels>
FK_INLINE void affine_row(const T* __restrict x, Channels channels, T* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto channel = channels.at(i);
    y[i] = affine(x[i], channel.scale, channel.shift);
  }
}

template <class T, class Channels>
FK_INLINE bool is_affine_row(const T* x, Channels channels, const T* y, int64_t count) {
  Bits<T> apart = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto channel = channels.at(i);
    apart |= bits_as<Bits<T>>(affine(x[i], channel.scale, channel.shift)) ^ bits_as<Bits<T>>(y[i]);
  }
  return apart == 0;
}

// Of x: each `alike` rows have the same scales and shifts, which are `step` behind those of the rows before.
template <class T>
struct AffineRows {
  const T* x;
  const Compute<T>*scale, *shift;
  int64_t length, alike, step;
};

template <class Channels, class T>
FK_INLINE void affine_rows(AffineRows<T> rows, T* y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last;) {
    const int64_t group = row / rows.alike, end = std::min(last, (group + 1) * rows.alike);
    const Channels channels(rows.scale + group * rows.step, rows.shift + group * rows.step);
    for (; row < end; ++row) affine_row(rows.x + row * rows.length, channels, y + row * rows.length, rows.length);
  }
}

template <class Channels, class T>
FK_INLINE bool are_affine_rows(AffineRows<T> rows, const T* y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last;) {
    const int64_t group = row / rows.alike, end = std::min(last, (group + 1) * rows.alike);
    const Channels channels(rows.scale + group * rows.step, rows.shift + group * rows.step);
    for (; row < end; ++row) {
      if (!is_affine_row(rows.x + row * rows.length, channels, y + row * rows.length, rows.length)) return false;
    }
  }
  return true;
}

}  // namespace freezekit::cpu
