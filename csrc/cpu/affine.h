// x * scale + shift, rounded once, as the machine code of torch's group and batch norms rounds it; and whether that is y,
// to the bit.
//
// In rows of contiguous elements: of one channel each, with one scale and one shift (NCHW), or of all channels (NHWC).
#pragma once

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
  FK_INLINE One at(int64_t) const { return *this; }
};
template <class C>
struct Each {
  const C* __restrict scale, * __restrict shift;
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

}  // namespace freezekit::cpu
