// The one multiplication of the tensor-core kernels, for 16-bit types and for float through tf32.
//
// An operand chunk is 16 bytes along the reduction: 8 values of 16 bits or 4 of 32. One step multiplies two chunks.
#pragma once

#include <type_traits>

#include "kernels/ptx.h"

namespace freezekit {

constexpr int kChunkBytes = 16;

// Values along the reduction that one mma takes.
template <class T>
constexpr int kMmaDepth = 2 * kChunkBytes / static_cast<int>(sizeof(T));

// D[16][8] += A[16][depth] * B[depth][8], fragments as in ptx.h.
template <class T>
FK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    ptx::mma_m16n8k8_tf32(d, a, b);
  } else {
    ptx::mma_m16n8k16<T>(d, a, b);
  }
}

// The tensor core drops the low bits of an fp32 value; rounding first halves the error.
template <class T, int N>
FK_DEVICE void round_fragment(uint32_t (&fragment)[N]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < N; ++i) fragment[i] = ptx::to_tf32(__uint_as_float(fragment[i]));
  }
}

}  // namespace freezekit
