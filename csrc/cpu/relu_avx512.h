// ReLU and its mask for float on AVX-512, whose comparisons give bits at once: one pass at the speed of memory, where
// compilers build the word from 32 lanes.
//
// Words [first, last) must be whole. Values and bits are those of gate.h's Relu and Select.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define FK_HAS_AVX512_RELU 1
#include <immintrin.h>
#else
#define FK_HAS_AVX512_RELU 0
#endif

namespace freezekit::cpu {

#if FK_HAS_AVX512_RELU

inline bool runs_avx512() {
  static const bool runs = __builtin_cpu_supports("avx512f");
  return runs;
}

__attribute__((target("avx512f"))) inline void relu_avx512(const float* x, float* y, uint32_t* bits, int64_t first,
                                                           int64_t last) {
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t word = first; word < last; ++word) {
    const __m512 low = _mm512_loadu_ps(x + 32 * word), high = _mm512_loadu_ps(x + 32 * word + 16);
    // !(x <= 0): true for NaN, which passes.
    const __mmask16 low_bits = _mm512_cmp_ps_mask(low, zero, _CMP_NLE_UQ);
    const __mmask16 high_bits = _mm512_cmp_ps_mask(high, zero, _CMP_NLE_UQ);
    _mm512_storeu_ps(y + 32 * word, _mm512_maskz_mov_ps(low_bits, low));
    _mm512_storeu_ps(y + 32 * word + 16, _mm512_maskz_mov_ps(high_bits, high));
    bits[word] = static_cast<uint32_t>(low_bits) | static_cast<uint32_t>(high_bits) << 16;
  }
}

__attribute__((target("avx512f"))) inline void select_avx512(const float* x, float* y, const uint32_t* bits,
                                                             int64_t first, int64_t last) {
  for (int64_t word = first; word < last; ++word) {
    const __m512 low = _mm512_loadu_ps(x + 32 * word), high = _mm512_loadu_ps(x + 32 * word + 16);
    _mm512_storeu_ps(y + 32 * word, _mm512_maskz_mov_ps(static_cast<__mmask16>(bits[word]), low));
    _mm512_storeu_ps(y + 32 * word + 16, _mm512_maskz_mov_ps(static_cast<__mmask16>(bits[word] >> 16), high));
  }
}

#endif

// Both do what words they can of [first, last) and return the first that is left.
template <class T>
int64_t relu_fast(const T*, T*, uint32_t*, int64_t first, int64_t) {
  return first;
}
template <class T>
int64_t select_fast(const T*, T*, const uint32_t*, int64_t first, int64_t) {
  return first;
}

#if FK_HAS_AVX512_RELU
inline int64_t relu_fast(const float* x, float* y, uint32_t* bits, int64_t first, int64_t last) {
  if (!runs_avx512()) return first;
  relu_avx512(x, y, bits, first, last);
  return last;
}
inline int64_t select_fast(const float* x, float* y, const uint32_t* bits, int64_t first, int64_t last) {
  if (!runs_avx512()) return first;
  select_avx512(x, y, bits, first, last);
  return last;
}
#endif

}  // namespace freezekit::cpu
