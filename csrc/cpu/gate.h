// Activations that are linear in pieces, and masks, on a CPU: one bit an element remembers the piece.
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

// Comparisons are written so that NaN falls where torch's backward formulas put it: it passes relu, takes leaky_relu's
// slope and stops at hardtanh. (There torch's own CPU kernel stops it in its vectors and passes it in the rest that fills
// no vector; its GPU kernel passes it.)
template <class C>
struct Relu {
  FK_INLINE bool bit(C x) const { return !(x <= C(0)); }
  FK_INLINE C value(C x) const { return x <= C(0) ? C(0) : x; }
};

template <class C>
struct LeakyRelu {
  C slope;
  FK_INLINE bool bit(C x) const { return x > C(0); }
  FK_INLINE C value(C x) const { return x > C(0) ? x : x * slope; }
};

// The ends of values are rounded to the tensor's dtype, those of the gradient are not: so torch does it.
template <class C>
struct Hardtanh {
  C lowest, highest;
  C below, above;
  FK_INLINE bool bit(C x) const { return x > below && x < above; }
  FK_INLINE C value(C x) const {
    const C raised = x < lowest ? lowest : x;
    return raised > highest ? highest : raised;
  }
};

template <class T, class Rule>
FK_INLINE void make_bits(const T* x, T* y, uint32_t* bits, int64_t numel, int64_t first,
                                                     int64_t last, Rule rule) {
  using C = Compute<T>;
  for (int64_t word = first; word < last; ++word) {
    const T* from = x + 32 * word;
    T* to = y + 32 * word;
    uint32_t packed = 0;
    if (32 * (word + 1) <= numel) {
      C values[32];
      for (int i = 0; i < 32; ++i) values[i] = up(from[i]);
      for (int i = 0; i < 32; ++i) packed |= rule.bit(values[i]) ? 1u << i : 0u;
      for (int i = 0; i < 32; ++i) to[i] = down<T>(rule.value(values[i]));
    } else {
      for (int i = 0; i < static_cast<int>(numel - 32 * word); ++i) {
        const C value = up(from[i]);
        packed |= rule.bit(value) ? 1u << i : 0u;
        to[i] = down<T>(rule.value(value));
      }
    }
    bits[word] = packed;
  }
}

// What carries T through a select: whole bits, which stop NaN and inf and compile to vector code for every T.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
struct Select {
  using Element = Bits<T>;
  FK_INLINE Element operator()(Element bit, Element x) const { return x & (Element(0) - bit); }
};

template <class T>
struct Scale {
  using Element = T;
  Compute<T> on, off;
  FK_INLINE T operator()(Bits<T> bit, T x) const { return down<T>(up(x) * (bit ? on : off)); }
};

// A whole word is read before it is written, so x and y may be one array and the loop still becomes vector code.
template <class T, class Rule>
FK_INLINE void apply_bits(const T* x, T* y, const uint32_t* bits, int64_t numel,
                                                      int64_t first, int64_t last, Rule rule) {
  using Element = typename Rule::Element;
  for (int64_t word = first; word < last; ++word) {
    const uint32_t packed = bits[word];
    const int64_t count = std::min<int64_t>(32, numel - 32 * word);
    Element values[32];
    if (count == 32) {
      std::memcpy(values, x + 32 * word, sizeof(values));
      for (int i = 0; i < 32; ++i) values[i] = rule(static_cast<Bits<T>>((packed >> i) & 1u), values[i]);
      std::memcpy(y + 32 * word, values, sizeof(values));
    } else {
      std::memcpy(values, x + 32 * word, count * sizeof(T));
      for (int i = 0; i < count; ++i) values[i] = rule(static_cast<Bits<T>>((packed >> i) & 1u), values[i]);
      std::memcpy(y + 32 * word, values, count * sizeof(T));
    }
  }
}

}  // namespace freezekit::cpu
