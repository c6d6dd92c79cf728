// As much of CUDA's runtime as csrc/kernels/device.h names where nvcc compiles it: for tests of what fails in it.
#pragma once

#include <cstddef>

#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct dim3 {
  dim3(unsigned x) : x(x) {}
  unsigned x;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
