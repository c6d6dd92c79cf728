// What a frozen block does to its convolution's result in one pass, and to the gradient that comes back, on a CPU.
//
//   finish:      y[i] = rule.value(v),  bit[i] = rule.bit(v),  v = round(y[i] * scale[k] + shift[k] + residual[i])
//   scale_back:  out[i] = (bit[i] ? dy[i] : 0) * scale[k], which is NaN where a masked element meets an infinite scale
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

// Scales and shifts of word after word of elements. Divisions for each would cost as much as the word itself.
template <class T>
class WordAffine {
 public:
  FK_INLINE WordAffine(const ChannelAffine<T>& affine, int64_t first)
      : affine_(affine), channel_(first / affine.plane % affine.channels), left_(affine.plane - first % affine.plane) {}

  // Those of the next `count` elements.
  FK_INLINE void next(int64_t count) {
    if (affine_.plane == 1) {
      scale = affine_.scale + channel_, shift = affine_.shift + channel_;
      for (channel_ += count; channel_ >= affine_.channels;) channel_ -= affine_.channels;
      return;
    }
    scale = own_scale_, shift = own_shift_;
    if (left_ >= 32) {
      if (filled_ != channel_) fill(0, 32);
      filled_ = channel_;
      skip(count);
      return;
    }
    filled_ = -1;
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(left_, count - i);
      fill(i, i + run);
      skip(run);
      i += run;
    }
  }

  const Compute<T>*scale = nullptr, *shift = nullptr;

 private:
  FK_INLINE void fill(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) own_scale_[i] = affine_.scale[channel_];
    for (int64_t i = first; i < last; ++i) own_shift_[i] = affine_.shift[channel_];
  }
  FK_INLINE void skip(int64_t count) {
    left_ -= count;
    if (left_ == 0) left_ = affine_.plane, channel_ = channel_ + 1 == affine_.channels ? 0 : channel_ + 1;
  }

  ChannelAffine<T> affine_;
  int64_t channel_, left_;  // of the element that comes next, and how many of its plane are left
  int64_t filled_ = -1;     // the channel of all that is below
  Compute<T> own_scale_[32], own_shift_[32];
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
  WordAffine<T> at(affine, 32 * first);
  for (int64_t word = first; word < last; ++word) {
    const int64_t offset = 32 * word, count = std::min<int64_t>(32, numel - offset);
    at.next(count);
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
  WordAffine<T> at(affine, 32 * first);
  for (int64_t word = first; word < last; ++word) {
    const int64_t offset = 32 * word, count = std::min<int64_t>(32, numel - offset);
    at.next(count);
    const uint32_t packed = bits ? bits[word] : ~uint32_t{0};
    auto* const to = reinterpret_cast<Shared<T>*>(out) + offset;
    const auto value = [&](int64_t i) {
      const Bits<T> let = Select<T>{}(static_cast<Bits<T>>((packed >> i) & 1u), bits_as<Bits<T>>(dy[offset + i]));
      return bits_as<Bits<T>>(down<T>(up(bits_as<T>(let)) * at.scale[i]));
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
