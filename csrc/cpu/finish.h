// What a frozen block does to its convolution's result in one pass, and to the gradient that comes back, on a CPU.
//
//   finish:      y[i] = rule.value(v),  bit[i] = rule.bit(v),  v = round(y[i] * scale[k] + shift[k] + residual[i])
//   scale_back:  out[i] = bit[i] ? dy[i] * scale[k] : 0
//
// k is element i's channel. Elements are taken in memory order, words of bits as in gate.h.
#pragma once

#include "cpu/gate.h"

namespace freezekit::cpu {

// A scale and a shift for each channel; `plane` elements of one channel follow each other in memory: H * W in NCHW. In
// NHWC it is 1, and the arrays go on with their first elements for 31 more, so that 32 can be read from anywhere.
template <class T>
struct ChannelAffine {
  const Compute<T>* scale;
  const Compute<T>* shift;
  int64_t channels, plane;
};

// Scales and shifts of 32 elements.
template <class T>
struct WordAffine {
  Compute<T> own_scale[32], own_shift[32];
  const Compute<T>*scale, *shift;

  FK_INLINE void move_to(const ChannelAffine<T>& affine, int64_t first, int64_t count) {
    if (affine.plane == 1) {
      const int64_t channel = first % affine.channels;
      scale = affine.scale + channel, shift = affine.shift + channel;
      return;
    }
    int64_t channel = first / affine.plane % affine.channels, left = affine.plane - first % affine.plane;
    if (left >= 32) {
      for (int i = 0; i < 32; ++i) own_scale[i] = affine.scale[channel];
      for (int i = 0; i < 32; ++i) own_shift[i] = affine.shift[channel];
    } else {
      for (int64_t i = 0; i < count; ++i) {
        own_scale[i] = affine.scale[channel], own_shift[i] = affine.shift[channel];
        if (--left == 0) left = affine.plane, channel = channel + 1 == affine.channels ? 0 : channel + 1;
      }
    }
    scale = own_scale, shift = own_shift;
  }
};

// No activation, and so no bits.
template <class T>
struct Identity {
  FK_INLINE bool bit(Bits<T>) const { return true; }
  FK_INLINE Bits<T> value(Bits<T> x) const { return x; }
};

// `bits` may be null.
template <bool kResidual, class T, class Rule>
FK_INLINE void finish(T* y, const T* residual, uint32_t* bits, const ChannelAffine<T>& affine, int64_t numel,
                      int64_t first, int64_t last, Rule rule) {
  WordAffine<T> at;
  for (int64_t word = first; word < last; ++word) {
    const int64_t offset = 32 * word, count = std::min<int64_t>(32, numel - offset);
    at.move_to(affine, offset, count);
    T* const to = y + offset;
    const T* const added = kResidual ? residual + offset : nullptr;
    const auto value = [&](int64_t i) {
      Compute<T> v = up(to[i]) * at.scale[i] + at.shift[i];
      if constexpr (kResidual) v += up(added[i]);
      return bits_as<Bits<T>>(down<T>(v));
    };
    Bits<T> values[32];
    uint8_t bytes[32] = {};
    if (count == 32) {
      for (int i = 0; i < 32; ++i) values[i] = value(i);
      if (bits) {
        for (int i = 0; i < 32; ++i) bytes[i] = rule.bit(values[i]);
      }
      for (int i = 0; i < 32; ++i) reinterpret_cast<Shared<T>*>(to)[i] = rule.value(values[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        values[i] = value(i);
        bytes[i] = rule.bit(values[i]);
        reinterpret_cast<Shared<T>*>(to)[i] = rule.value(values[i]);
      }
    }
    if (bits) bits[word] = pack_bytes(bytes);
  }
}

// `bits` may be null: all are set. dy and out may be one array.
template <class T>
FK_INLINE void scale_back(const T* dy, T* out, const uint32_t* bits, const ChannelAffine<T>& affine, int64_t numel,
                          int64_t first, int64_t last) {
  WordAffine<T> at;
  for (int64_t word = first; word < last; ++word) {
    const int64_t offset = 32 * word, count = std::min<int64_t>(32, numel - offset);
    at.move_to(affine, offset, count);
    const uint32_t packed = bits ? bits[word] : ~uint32_t{0};
    auto* const to = reinterpret_cast<Shared<T>*>(out) + offset;
    const auto value = [&](int64_t i) {
      const Bits<T> scaled = bits_as<Bits<T>>(down<T>(up(dy[offset + i]) * at.scale[i]));
      return Select<T>{}(static_cast<Bits<T>>((packed >> i) & 1u), scaled);
    };
    if (count == 32) {
      Bits<T> values[32];
      for (int i = 0; i < 32; ++i) values[i] = value(i);
      for (int i = 0; i < 32; ++i) to[i] = values[i];
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = value(i);
    }
  }
}

}  // namespace freezekit::cpu
