// The multiplications of the sm_80 tensor-core kernels, for 16-bit types and for float through tf32.
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

constexpr int kWarpColumns = 32;  // of a warp's tile

// acc += A * B of one step along the reduction; acc[i][j] is the 16 x 8 fragment at rows 16 * i, columns 8 * j of the
// warp's tile. load_a(a, i) reads the fragment of rows 16 * i on, load_b(b, j) those of columns 16 * j and 16 * j + 8.
template <class T, int kFragments, class LoadA, class LoadB>
FK_DEVICE void multiply_step(float (&acc)[kFragments][kWarpColumns / 8][4], const LoadA& load_a, const LoadB& load_b) {
  uint32_t b[kWarpColumns / 16][4];
#pragma unroll
  for (int j = 0; j < kWarpColumns / 16; ++j) {
    load_b(b[j], j);
    round_fragment<T>(b[j]);
  }
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    uint32_t a[4];
    load_a(a, i);
    round_fragment<T>(a);
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      multiply<T>(acc[i][j], a, half);
    }
  }
}

}  // namespace freezekit
