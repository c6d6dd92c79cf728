// FK_HOST_DEVICE marks index maths that the host, the emulator and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define FK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FK_HOST_DEVICE inline
#endif
