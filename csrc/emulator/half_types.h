// __half and __nv_bfloat16 for the emulated build: IEEE binary16 and bfloat16, rounded to nearest even. A NaN becomes
// 0x7fff, as CUDA's conversions make it. The names are those of cuda_fp16.h and cuda_bf16.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace freezekit::emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);  // a carry out of the mantissa is right
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 halves are 2^-24 apart, as floats in [0.5, 1) are: adding 0.5 makes the addition round.
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13));
}

inline float half_value(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits_float(sign | float_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace freezekit::emulator

// `bits` is public so that tests and masks can build any value; default construction leaves it uninitialised, as on
// the GPU.
struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline __half __float2half_rn(float v) { return {freezekit::emulator::half_bits(v)}; }
inline float __half2float(__half v) { return freezekit::emulator::half_value(v.bits); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {freezekit::emulator::bfloat16_bits(v)}; }
inline float __bfloat162float(__nv_bfloat16 v) { return freezekit::emulator::bits_float(uint32_t{v.bits} << 16); }
