// The driver's two functions that encode tensor maps, which here only take notes. Included once in a program.
#pragma once

#include <cuda.h>

#include <cstring>

#include "tests/truth/record.h"

namespace truth {

inline Map noted;  // by the latest call; its address is not yet an offset

inline CUresult note(bool im2col, CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* traversal,
                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  noted = {im2col, type, rank};
  noted.address = reinterpret_cast<intptr_t>(address);
  noted.swizzle = swizzle, noted.interleave = interleave, noted.fill = fill;
  if (rank > 4) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    noted.sizes[i] = static_cast<int64_t>(sizes[i]), noted.traversal[i] = traversal[i];
    if (i > 0) noted.strides[i - 1] = static_cast<int64_t>(strides[i - 1]);
  }
  return CUDA_SUCCESS;
}

}  // namespace truth

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                                   void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                                   const cuuint32_t* box, const cuuint32_t* traversal,
                                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult result =
      truth::note(false, map, type, rank, address, sizes, strides, traversal, interleave, swizzle, fill);
  for (cuuint32_t i = 0; result == CUDA_SUCCESS && i < rank; ++i) truth::noted.box[i] = box[i];
  return result;
}

extern "C" CUresult CUDAAPI cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                                    void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                                    const int* lower, const int* upper, cuuint32_t channels,
                                                    cuuint32_t pixels, const cuuint32_t* traversal,
                                                    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult result =
      truth::note(true, map, type, rank, address, sizes, strides, traversal, interleave, swizzle, fill);
  for (int i = 0; i < 2; ++i) truth::noted.lower[i] = lower[i], truth::noted.upper[i] = upper[i];
  truth::noted.channels = channels, truth::noted.pixels = pixels;
  return result;
}
