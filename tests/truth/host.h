// What makes g++ read CuTe's and CUTLASS's headers: names of device code that their templates mention, none of which runs,
// and shared memory whose addresses are pointers' values, so that a tile that begins at the null pointer begins at address 0.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }

inline const dim3 blockDim, gridDim;
inline const uint3 threadIdx{}, blockIdx{};
inline void __syncthreads() {}
inline void __syncwarp(unsigned = ~0u) {}
inline int __dp4a(int, int, int sum) { return sum; }
inline unsigned __byte_perm(unsigned x, unsigned, unsigned) { return x; }
inline int __shfl_sync(unsigned, int value, int) { return value; }

#define EXPORT extern "C" __attribute__((visibility("default")))
