// FK_SIMD_CLONES compiles a function once for each of x86-64's vector widths; the loader picks the widest that runs.
//
// Everything that such a function calls is compiled into it (flatten): a call out of it would run the baseline's code,
// and one from wide vectors into that costs far more than the call.
//
// The build itself assumes no more than the baseline, so a wheel runs everywhere. Other compilers and machines get the
// function once, vectorised as far as their baseline goes.
#pragma once

#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FK_SIMD_CLONES                                                         \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), \
                 optimize("O3", "no-math-errno", "no-trapping-math"), flatten))
#define FK_SIMD_FOR(level) \
  __attribute__((target("arch=x86-64-" level), optimize("O3", "no-math-errno", "no-trapping-math"), flatten))
#define FK_HAS_SIMD_CLONES 1
#else
#define FK_SIMD_CLONES
#define FK_SIMD_FOR(level)
#define FK_HAS_SIMD_CLONES 0
#endif

// For functions that only ever run inside such a one.
#if defined(__GNUC__)
#define FK_INLINE inline __attribute__((always_inline))
#else
#define FK_INLINE inline
#endif

namespace freezekit::cpu {

constexpr bool kHasClones = FK_HAS_SIMD_CLONES;

template <int kLanes>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * kLanes)));  // NOLINT: the attribute goes with typedef alone
  typedef int Index __attribute__((vector_size(4 * kLanes)));   // NOLINT
};

template <int kLanes>
FK_INLINE auto load(const float* from) {
  typename Vector<kLanes>::Type vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <class V>
FK_INLINE void store(float* to, V vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Those of `first` and then of `second`, as if these were one array, at places that are known when this is compiled.
template <class V, class Index>
FK_INLINE V pick_lanes(V first, V second, Index from) {
#ifdef __clang__
  constexpr int kLanes = sizeof(V) / sizeof(float);
  V made;
  for (int lane = 0; lane < kLanes; ++lane) {
    made[lane] = from[lane] < kLanes ? first[from[lane]] : second[from[lane] - kLanes];
  }
  return made;
#else
  return __builtin_shuffle(first, second, from);
#endif
}

// A function as such a one. Arguments are passed as they are given: by std::ref, references.
template <auto kFunction, class... Arguments>
static FK_SIMD_CLONES auto in_vectors(Arguments... arguments) {
  return kFunction(arguments...);
}

// Once, for processors whose vectors have so many floats: 16 those of AVX-512, 8 those of AVX2.
template <int kLanes>
struct InVectorsOf;
template <>
struct InVectorsOf<16> {
  template <auto kFunction, class... Arguments>
  static FK_SIMD_FOR("v4") auto run(Arguments... arguments) {
    return kFunction(arguments...);
  }
};
template <>
struct InVectorsOf<8> {
  template <auto kFunction, class... Arguments>
  static FK_SIMD_FOR("v3") auto run(Arguments... arguments) {
    return kFunction(arguments...);
  }
};

}  // namespace freezekit::cpu
