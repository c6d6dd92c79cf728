// Activations that are linear in pieces, and masks, on a CPU: one bit per element remembers the piece.
//
//   make_bits:   y[i] = rule.value(x[i]),  bit[i] = rule.bit(x[i])
//   apply_bits:  y[i] = bit[i] ? on * x[i] : off * x[i],  or exactly x[i] and 0 (a select, which stops NaN and inf)
//
// Elements are taken in memory order, masks as core/mask.h lays them out. Work is cut at words: [first, last) are words,
// so threads never share one. T converts to and from Compute<T>, in which all arithmetic is done.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/mask.h"
#include "cpu/compute.h"
#include "cpu/simd.h"

namespace freezekit::cpu {

// Bits<T> as seen through a pointer to an array of T.
template <class T>
using Shared __attribute__((may_alias)) = Bits<T>;

// Rules. Comparisons are written so that NaN falls where torch's backward formulas put it: it passes relu, takes
// leaky_relu's slope and stops at hardtanh. (There torch's own CPU kernel stops it in its vectors and passes it in the
// rest that fills no vector; its GPU kernel passes it.)

// On whole bits, where a positive number is a positive integer and a NaN is beyond infinity: no conversion is needed.
template <class T>
struct Relu {
  static constexpr Bits<T> kNegativeInfinity =
      sizeof(T) == 8   ? static_cast<Bits<T>>(0xfff0000000000000u)
      : sizeof(T) == 4 ? static_cast<Bits<T>>(0xff800000u)
                       : static_cast<Bits<T>>(kFormat<T> == Format::float16 ? 0xfc00u : 0xff80u);

  FK_INLINE bool bit(Bits<T> x) const {
    return (static_cast<std::make_signed_t<Bits<T>>>(x) > 0) | (x > kNegativeInfinity);
  }
  FK_INLINE Bits<T> value(Bits<T> x) const { return x & (Bits<T>(0) - Bits<T>(bit(x))); }
};

template <class T>
struct LeakyRelu {
  Compute<T> slope;
  FK_INLINE bool bit(Bits<T> x) const { return up(bits_as<T>(x)) > 0; }
  FK_INLINE Bits<T> value(Bits<T> x) const {
    const Compute<T> value = up(bits_as<T>(x));
    return bits_as<Bits<T>>(down<T>(value * pick(value > 0, Compute<T>(1), slope)));
  }
};

// x, or `other` where x is at most `threshold`.
template <class T>
struct Threshold {
  Compute<T> threshold;
  Bits<T> other;
  FK_INLINE bool bit(Bits<T> x) const { return !(up(bits_as<T>(x)) <= threshold); }
  FK_INLINE Bits<T> value(Bits<T> x) const {
    const Bits<T> mask = Bits<T>(0) - Bits<T>(bit(x));
    return (x & mask) | (other & ~mask);
  }
};

// The ends of values are rounded to the tensor's dtype, those of the gradient are not: so torch does it.
template <class T>
struct Hardtanh {
  Compute<T> lowest, highest;
  Compute<T> below, above;
  FK_INLINE bool bit(Bits<T> x) const {
    const Compute<T> value = up(bits_as<T>(x));
    return (value > below) & (value < above);
  }
  FK_INLINE Bits<T> value(Bits<T> x) const {
    const Compute<T> value = up(bits_as<T>(x)), raised = pick(value < lowest, lowest, value);
    return bits_as<Bits<T>>(down<T>(pick(raised > highest, highest, raised)));
  }
};

// Bit i is byte i, of 32 that are 0 or 1. A product moves eight bytes' bits side by side into its highest byte: lanes
// to bits in a handful of instructions, where vectors have no masks of their own.
FK_INLINE uint32_t pack_bytes(const uint8_t (&bytes)[32]) {
  uint64_t eights[4];
  std::memcpy(eights, bytes, sizeof(bytes));
  uint32_t packed = 0;
  for (int i = 0; i < 4; ++i) packed |= static_cast<uint32_t>(eights[i] * 0x0102040810204080u >> 56) << 8 * i;
  return packed;
}

// A whole word is read before it is written, so x and y may be one array and the loops still become vector code. Rules
// read x itself: a copy made first would be stored in pieces smaller than the vectors that are loaded from it next.
template <class T, class Rule>
FK_INLINE void make_bits(const T* x, T* y, uint32_t* bits, int64_t numel, int64_t first, int64_t last, Rule rule) {
  for (int64_t word = first; word < last; ++word) {
    const int64_t count = std::min<int64_t>(32, numel - 32 * word);
    const auto* const from = reinterpret_cast<const Shared<T>*>(x) + 32 * word;
    auto* const to = reinterpret_cast<Shared<T>*>(y) + 32 * word;
    Bits<T> values[32];
    uint8_t bytes[32] = {};
    if (count == 32) {
      for (int i = 0; i < 32; ++i) bytes[i] = rule.bit(from[i]);
      for (int i = 0; i < 32; ++i) values[i] = rule.value(from[i]);
      for (int i = 0; i < 32; ++i) to[i] = values[i];
    } else {
      std::memcpy(values, from, count * sizeof(T));
      for (int i = 0; i < count; ++i) bytes[i] = rule.bit(values[i]), values[i] = rule.value(values[i]);
      std::memcpy(to, values, count * sizeof(T));
    }
    bits[word] = pack_bytes(bytes);
  }
}

template <class T>
struct Select {
  FK_INLINE Bits<T> operator()(Bits<T> bit, Bits<T> x) const { return x & (Bits<T>(0) - bit); }
};

template <class T>
struct Scale {
  Compute<T> on, off;
  FK_INLINE Bits<T> operator()(Bits<T> bit, Bits<T> x) const {
    return bits_as<Bits<T>>(down<T>(up(bits_as<T>(x)) * pick(bit != 0, on, off)));
  }
};

template <class T, class Rule>
FK_INLINE void apply_bits(const T* x, T* y, const uint32_t* bits, int64_t numel, int64_t first, int64_t last,
                          Rule rule) {
  for (int64_t word = first; word < last; ++word) {
    const uint32_t packed = bits[word];
    const int64_t count = std::min<int64_t>(32, numel - 32 * word);
    const auto* const from = reinterpret_cast<const Shared<T>*>(x) + 32 * word;
    auto* const to = reinterpret_cast<Shared<T>*>(y) + 32 * word;
    Bits<T> values[32];
    if (count == 32) {
      for (int i = 0; i < 32; ++i) values[i] = rule(static_cast<Bits<T>>((packed >> i) & 1u), from[i]);
      for (int i = 0; i < 32; ++i) to[i] = values[i];
    } else {
      std::memcpy(values, from, count * sizeof(T));
      for (int i = 0; i < count; ++i) values[i] = rule(static_cast<Bits<T>>((packed >> i) & 1u), values[i]);
      std::memcpy(to, values, count * sizeof(T));
    }
  }
}

}  // namespace freezekit::cpu
