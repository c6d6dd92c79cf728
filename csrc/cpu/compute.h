// What arithmetic on elements of type T is done in: double for double, float for everything else, and the ways there.
//
// The 16-bit types' own conversions are functions that compilers leave out of line here and there, and one call per
// element out of vector code costs a hundred times the work: these are always inlined. They round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace freezekit::cpu {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What elements of T are carried in: whole bits, which compile to vector code for every T, and a select of which stops
// NaN and inf.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class To, class From>
FK_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Element types say which format they are by a specialisation of kFormat.
enum class Format { other, bfloat16, float16 };
template <class T>
inline constexpr Format kFormat = Format::other;

// condition ? a : b as arithmetic on bits. Compilers make branches of the operator itself here and there, and a loop
// with one is not vectorised.
template <class T>
FK_INLINE T pick(bool condition, T a, T b) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const Word mask = Word(0) - Word(condition);
  return bits_as<T>((bits_as<Word>(a) & mask) | (bits_as<Word>(b) & ~mask));
}

template <class T>
FK_INLINE Compute<T> up(T x) {
  if constexpr (kFormat<T> == Format::bfloat16) {
    return bits_as<float>(static_cast<uint32_t>(bits_as<uint16_t>(x)) << 16);
  } else if constexpr (kFormat<T> == Format::float16) {
    const uint32_t bits = bits_as<uint16_t>(x), size = (bits & 0x7fffu) << 13;
    // The exponent's bias is corrected by a product, which also makes a subnormal what it is; infinity and NaN stay.
    const uint32_t finite = bits_as<uint32_t>(bits_as<float>(size) * 0x1p112f);
    const uint32_t value = pick(size < 0x7c00u << 13, finite, size | 0x7f800000u);
    return bits_as<float>(value | (bits & 0x8000u) << 16);
  } else {
    return static_cast<Compute<T>>(x);
  }
}

template <class T>
FK_INLINE T down(Compute<T> x) {
  if constexpr (kFormat<T> == Format::bfloat16) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bits_as<T>(static_cast<uint16_t>(pick(x != x, 0x7fc0u, rounded)));
  } else if constexpr (kFormat<T> == Format::float16) {
    const uint32_t bits = bits_as<uint32_t>(x), size = bits & 0x7fffffffu;
    const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    // Next to 0.5 the step of float is that of subnormals here, so that the sum is rounded where they end.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - bits_as<uint32_t>(0.5f);
    uint32_t value = pick(size < 0x38800000u, subnormal, normal);
    value = pick(size >= 0x477ff000u, 0x7c00u, value);  // 65520 and more round to infinity
    value = pick(size > 0x7f800000u, 0x7e00u, value);
    return bits_as<T>(static_cast<uint16_t>(value | (bits >> 16 & 0x8000u)));
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace freezekit::cpu
