// The part of CUDA C++ that kernels use, for g++: qualifiers, built-in variables, intrinsics, atomics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/emulator.h"
#include "emulator/half_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
// Not even g++'s own: it would license g++ to move accesses across a race that must show.
#define __restrict__

#define threadIdx (::freezekit::emulator::thread_index)
#define blockIdx (::freezekit::emulator::block_index)
#define blockDim (::freezekit::emulator::block_size)
#define gridDim (::freezekit::emulator::grid_size)

using cudaStream_t = void*;

// The defaulted arguments are evaluated at the call, so that two barriers differ however g++ duplicates code.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  freezekit::emulator::block_barrier(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { freezekit::emulator::warp_barrier(mask); }

inline unsigned __float_as_uint(float v) { return freezekit::emulator::float_bits(v); }
inline float __uint_as_float(unsigned v) { return freezekit::emulator::bits_float(v); }

// CUDA's overloads, mixed arguments left out: an ambiguous call is an error here, a silent conversion there.
using std::max;
using std::min;

// Relaxed like CUDA's; real atomic operations, so that TSan sees them as such.
template <class Bits, class T, class F>
T freezekit_atomic_update(T* p, F&& next) {
  static_assert(sizeof(Bits) == sizeof(T), "");
  Bits seen = __atomic_load_n(reinterpret_cast<Bits*>(p), __ATOMIC_RELAXED), wanted;
  T old;
  do {
    std::memcpy(&old, &seen, sizeof old);
    const T value = next(old);
    std::memcpy(&wanted, &value, sizeof wanted);
  } while (!__atomic_compare_exchange_n(reinterpret_cast<Bits*>(p), &seen, wanted, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  return old;
}
inline float atomicAdd(float* p, float v) {
  return freezekit_atomic_update<uint32_t>(p, [=](float old) { return old + v; });
}
inline double atomicAdd(double* p, double v) {
  return freezekit_atomic_update<uint64_t>(p, [=](double old) { return old + v; });
}
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
