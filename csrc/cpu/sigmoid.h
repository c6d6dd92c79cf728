// Sigmoid and SiLU of a multiple of x in one pass, rounded as torch rounds them; and whether that is y, to the bit.
//
//   sigmoid:  y[i] = 1 / (1 + e^-z),  z = factor * x[i]
//   silu:     y[i] = z / (1 + e^-z)
//
// Torch computes e^z step by step as here where elements fill two vectors (Sleef's algorithm, to 1 ulp), and the elements
// that are left, from `alone` on, by the C library. This is held against torch in each use: what differs is torch's.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/compute.h"

namespace freezekit::cpu {

FK_INLINE float power_of_two(int32_t n) { return bits_as<float>(static_cast<uint32_t>(n + 127) << 23); }

// e^z = 2^n * e^r, with a polynomial for e^r. 2^n is two factors: it alone may be out of float's range.
FK_INLINE float exponential_by_sleef(float z) {
  constexpr float kWhole = 0x1.8p23f;  // as far as whole numbers alone are floats
  const float n = std::rint(z * 1.44269504f);
  const int32_t whole = bits_as<int32_t>(n + kWhole) - bits_as<int32_t>(kWhole), half = whole >> 1;
  float r = std::fma(n, -0.693145751953125f, z);
  r = std::fma(n, -1.428606765330187e-06f, r);
  float p = 0.00019852762f;
  p = std::fma(p, r, 0.0013930436f);
  p = std::fma(p, r, 0.008333361f);
  p = std::fma(p, r, 0.041666485f);
  p = std::fma(p, r, 0.16666667f);
  p = std::fma(p, r, 0.5f);
  p = 1.0f + std::fma(r * r, p, r);
  p = p * power_of_two(half) * power_of_two(whole - half);
  p = pick(z < -104.0f, 0.0f, p);
  return pick(z > 104.0f, std::numeric_limits<float>::infinity(), p);
}

struct Sigmoid {
  bool is_silu = false;
  float factor = 1;

  FK_INLINE float in_vectors(float x) const { return of(x * factor, exponential_by_sleef(-(x * factor))); }
  FK_INLINE float alone(float x) const { return of(x * factor, std::exp(-(x * factor))); }

 private:
  FK_INLINE float of(float z, float e) const { return pick(is_silu, z, 1.0f) / (1.0f + e); }
};

FK_INLINE void sigmoid_row(const float* __restrict x, float* __restrict y, int64_t alone, int64_t count, Sigmoid f) {
  for (int64_t i = 0; i < alone; ++i) y[i] = f.in_vectors(x[i]);
  for (int64_t i = alone; i < count; ++i) y[i] = f.alone(x[i]);
}

FK_INLINE bool is_sigmoid_row(const float* x, const float* y, int64_t alone, int64_t count, Sigmoid f) {
  uint32_t apart = 0;
  for (int64_t i = 0; i < alone; ++i) apart |= bits_as<uint32_t>(f.in_vectors(x[i])) ^ bits_as<uint32_t>(y[i]);
  for (int64_t i = alone; i < count; ++i) apart |= bits_as<uint32_t>(f.alone(x[i])) ^ bits_as<uint32_t>(y[i]);
  return apart == 0;
}

}  // namespace freezekit::cpu
