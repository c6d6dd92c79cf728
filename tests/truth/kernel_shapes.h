// Kernels around one wrapper, the same for both sides: nothing but the wrapper can make their machine code differ. Row is
// each side's type of 16 bytes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#define KERNEL extern "C" __global__ void
// Sixteen bytes of shared memory that hold a T.
#define SHARED(T, name)                                    \
  __shared__ __align__(16) unsigned char name##_bytes[16]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

#define PLAIN(name, ...) \
  KERNEL of_##name() { __VA_ARGS__; }
#define OF_THREE_WARPGROUPS(name, ...) \
  KERNEL __launch_bounds__(384, 1) of_##name() { __VA_ARGS__; }
#define COPY(name, T, ...)                 \
  KERNEL of_##name(T* global, bool copy) { \
    SHARED(T, shared);                     \
    __VA_ARGS__;                           \
  }
#define LOAD(name, count, ...)                     \
  KERNEL of_##name(uint32_t* out) {                \
    SHARED(Row, row);                              \
    uint32_t d[count] = {};                        \
    __VA_ARGS__;                                   \
    for (int i = 0; i < count; ++i) out[i] = d[i]; \
  }
#define MMA(name, ...)                                                       \
  KERNEL of_##name(float* out, const uint32_t* of_a, const uint32_t* of_b) { \
    float d[4];                                                              \
    uint32_t a[4], b[2];                                                     \
    for (int i = 0; i < 4; ++i) d[i] = out[i], a[i] = of_a[i];               \
    for (int i = 0; i < 2; ++i) b[i] = of_b[i];                              \
    __VA_ARGS__;                                                             \
    for (int i = 0; i < 4; ++i) out[i] = d[i];                               \
  }
#define ON_BARRIER(name, ...)         \
  KERNEL of_##name(uint32_t number) { \
    SHARED(uint64_t, barrier);        \
    __VA_ARGS__;                      \
  }
#define TENSOR(name, ...)                                                                       \
  KERNEL of_##name(const __grid_constant__ CUtensorMap map, const int4 at, const int2 offset) { \
    SHARED(uint64_t, barrier);                                                                  \
    SHARED(Row, shared);                                                                        \
    __VA_ARGS__;                                                                                \
  }
#define WGMMA(name, count, ...)                          \
  KERNEL of_##name(float* out, uint64_t a, uint64_t b) { \
    float d[count];                                      \
    for (int i = 0; i < count; ++i) d[i] = out[i];       \
    __VA_ARGS__;                                         \
    for (int i = 0; i < count; ++i) out[i] = d[i];       \
  }
