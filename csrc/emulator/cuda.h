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
#define __constant__ static
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
inline void __threadfence() { freezekit::emulator::memory_fence(); }
inline void __threadfence_block() { freezekit::emulator::memory_fence(); }

namespace freezekit::emulator {

template <class T>
T shuffle_value(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace freezekit::emulator

// A source beyond the segment of `width` lanes gives the lane its own value, as on the GPU.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = freezekit::emulator::lane();
  return freezekit::emulator::shuffle_value(mask, value, (lane & -width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = freezekit::emulator::lane(), source = lane ^ lane_mask;
  return freezekit::emulator::shuffle_value(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = freezekit::emulator::lane(), source = lane + static_cast<int>(delta);
  return freezekit::emulator::shuffle_value(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = freezekit::emulator::lane(), source = lane - static_cast<int>(delta);
  return freezekit::emulator::shuffle_value(mask, value, source >= (lane & -width) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return freezekit::emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __float_as_uint(float v) { return freezekit::emulator::float_bits(v); }
inline float __uint_as_float(unsigned v) { return freezekit::emulator::bits_float(v); }
inline int __float_as_int(float v) { return static_cast<int>(freezekit::emulator::float_bits(v)); }
inline float __int_as_float(int v) { return freezekit::emulator::bits_float(static_cast<unsigned>(v)); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

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
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAnd(unsigned* p, unsigned v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicExch(unsigned* p, unsigned v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
