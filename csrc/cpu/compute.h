// What arithmetic on elements of type T is done in: double for double, float for everything else, and the ways there.
//
// The 16-bit types' own conversions are functions that compilers leave out of line here and there, and one call an
// element out of vector code costs a hundred times the work: these are inlined always. They round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace freezekit::cpu {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

template <class T>
FK_INLINE Compute<T> up(T x) {
  if constexpr (kFormat<T> == Format::bfloat16) {
    return bits_as<float>(static_cast<uint32_t>(bits_as<uint16_t>(x)) << 16);
#ifdef __FLT16_MANT_DIG__
  } else if constexpr (kFormat<T> == Format::float16) {
    return static_cast<float>(bits_as<_Float16>(x));
#endif
  } else {
    return static_cast<Compute<T>>(x);
  }
}

template <class T>
FK_INLINE T down(Compute<T> x) {
  if constexpr (kFormat<T> == Format::bfloat16) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bits_as<T>(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded));
#ifdef __FLT16_MANT_DIG__
  } else if constexpr (kFormat<T> == Format::float16) {
    return bits_as<T>(static_cast<_Float16>(x));
#endif
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace freezekit::cpu
