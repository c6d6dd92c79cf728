// Derivatives of smooth activations in 8 or 4 bits, on a CPU.
//
//   encode:   code[i] = round(derivative(x[i]) / step) + zero
//   decode:   dx[i] = dy[i] * (code[i] - zero) * step
//
// A derivative lies in an interval that is known beforehand, so one step serves all elements, and no element's code depends
// on another's. 0 and what the derivative is far to the right (1, or ELU's scale) are codes themselves, and so exact. The
// last code stands for NaN. Codes of 8 bits follow each other in memory order. Of 4 bits, a block of 64 elements takes 32
// bytes, byte j holding the codes of elements j and 32 + j; of a last block of n elements, j and (n + 1) / 2 + j.
//
// All arithmetic is float's. What is computed of a derivative is within kRounding of it, in units of its value far right.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/compute.h"
#include "cpu/simd.h"

namespace freezekit::cpu {

constexpr int64_t kCodeBlock = 64;
constexpr double kRounding = 2e-6;

// code = derivative / unit * steps + zero, from 0 to last - 1; `last` is NaN's.
struct CodeGrid {
  float unit = 1;
  float steps = 0, zero = 0;
  int32_t last = 0;

  // The finest for derivatives between -below * unit and (1 + above) * unit. What is beyond the outermost codes by half a
  // step is within the bound, too.
  static CodeGrid of(int bits, double unit, double below, double above) {
    CodeGrid grid;
    grid.unit = static_cast<float>(unit);
    grid.last = (1 << bits) - 1;
    const auto codes = [](double range, int steps) { return std::max(0.0, std::ceil(range * steps - 0.5)); };
    int steps = grid.last - 1;
    while (codes(below, steps) + steps + codes(above, steps) > grid.last - 1) --steps;
    grid.steps = static_cast<float>(steps);
    grid.zero = static_cast<float>(codes(below, steps));
    return grid;
  }

  FK_INLINE float value(int32_t code) const {
    const float derivative = (static_cast<float>(code) - zero) / steps * unit;
    return pick(code == last, std::numeric_limits<float>::quiet_NaN(), derivative);
  }
};

// e^x for -87 <= x <= 88: 2^n times a polynomial of the rest, which is ln 2 / 2 at most.
FK_INLINE float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits behind the point
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_as<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

FK_INLINE float clamped(float x, float most) {
  x = pick(x < -most, -most, x);
  return pick(x > most, most, x);
}

constexpr float kLargest = std::numeric_limits<float>::max();

// Rules: the derivative, of any x but NaN. Where torch's own formula gives NaN (0 times infinity), is_nan says so.
struct Silu {
  static constexpr double kBelow = 0.09984, kAbove = 0.09984;
  FK_INLINE bool is_nan(float x) const { return !(std::abs(x) <= kLargest); }
  FK_INLINE float derivative(float x) const {
    x = clamped(x, 40);
    const float s = 1 / (1 + exponential(-x));
    return s * (1 + x * (1 - s));
  }
};

struct Gelu {
  static constexpr double kBelow = 0.12905, kAbove = 0.12905;
  FK_INLINE bool is_nan(float x) const { return !(std::abs(x) <= kLargest); }
  // Phi(x) + x phi(x), Phi by Hastings' approximation of erf: a polynomial of t times e^(-x^2 / 2), which phi has as well.
  FK_INLINE float derivative(float x) const {
    x = clamped(x, 12);
    const float t = 1 / (1 + 0.3275911f * 0.70710678f * std::abs(x));
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float e = exponential(-0.5f * x * x);
    const float beyond = 0.5f * p * t * e;
    return pick(x < 0, beyond, 1 - beyond) + x * e * 0.39894228f;
  }
};

struct GeluTanh {
  static constexpr double kBelow = 0.1290, kAbove = 0.1290;
  // Torch squares x.
  FK_INLINE bool is_nan(float x) const { return !(x * x <= kLargest); }
  FK_INLINE float derivative(float x) const {
    x = clamped(x, 10);
    constexpr float kScale = 0.79788456f, kCube = 0.044715f;
    const float square = x * x, inner = kScale * x * (1 + kCube * square);
    const float t = 1 - 2 / (1 + exponential(clamped(2 * inner, 80)));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kScale * (1 + 3 * kCube * square);
  }
};

struct Mish {
  static constexpr double kBelow = 0.11253, kAbove = 0.0885;
  FK_INLINE bool is_nan(float x) const { return !(std::abs(x) <= kLargest); }
  // tanh(ln(1 + e^x)) = w / (w + 2) with w = e^x (e^x + 2).
  FK_INLINE float derivative(float x) const {
    x = clamped(x, 30);
    const float e = exponential(x), w = e * (e + 2), rest = 2 / (w + 2), t = 1 - rest;
    return t + x * (e / (1 + e)) * rest * (1 + t);
  }
};

struct Hardswish {
  static constexpr double kBelow = 0.5, kAbove = 0.5;
  FK_INLINE bool is_nan(float x) const { return x != x; }
  // The ends are torch's.
  FK_INLINE float derivative(float x) const {
    const float inside = x / 3 + 0.5f;
    return pick(x <= -3, 0.0f, pick(x < 3, inside, 1.0f));
  }
};

// sigmoid(beta x), or 1 where beta x is beyond the threshold.
struct Softplus {
  static constexpr double kBelow = 0, kAbove = 0;
  float beta, threshold;
  FK_INLINE bool is_nan(float x) const { return x != x; }
  FK_INLINE float derivative(float x) const {
    x *= beta;
    return pick(x > threshold, 1.0f, 1 / (1 + exponential(clamped(-x, 80))));
  }
};

// scale where x > 0, else scale * alpha * input_scale * e^(input_scale x).
struct Elu {
  float scale, left, input_scale;  // left: at 0
  FK_INLINE bool is_nan(float x) const { return x != x; }
  FK_INLINE float derivative(float x) const {
    return pick(x > 0, scale, left * exponential(clamped(x * input_scale, 80)));
  }
};

template <class T, class Rule>
FK_INLINE void encode(const T* __restrict x, uint8_t* __restrict codes, int64_t count, Rule rule,
                      const CodeGrid& grid) {
  const float per_unit = grid.steps / grid.unit, half = grid.zero + 0.5f, most = static_cast<float>(grid.last - 1);
  const float nan = static_cast<float>(grid.last);
  for (int64_t i = 0; i < count; ++i) {
    const float v = up(x[i]);
    const bool is_nan = rule.is_nan(v);
    float code = rule.derivative(pick(is_nan, 0.0f, v)) * per_unit + half;
    code = pick(code < 0, 0.0f, code);
    code = pick(code > most, most, code);
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(pick(is_nan, nan, code)));
  }
}

// Codes of 4 bits of a block of at most kCodeBlock elements: `half` of them are the lower halves of bytes.
template <class T, class Rule>
FK_INLINE void encode_pairs(const T* x, uint8_t* codes, int64_t count, int64_t half, Rule rule, const CodeGrid& grid) {
  uint8_t low[kCodeBlock / 2], high[kCodeBlock / 2] = {};
  encode(x, low, half, rule, grid);
  encode(x + half, high, count - half, rule, grid);
  for (int64_t j = 0; j < half; ++j) codes[j] = static_cast<uint8_t>(low[j] | high[j] << 4);
}

// Blocks [first, last) of kCodeBlock elements, of which there are `numel`. Of whole ones compilers know the size.
template <int kBits, class T, class Rule>
FK_INLINE void encode_blocks(const T* x, uint8_t* codes, int64_t numel, int64_t first, int64_t last, Rule rule,
                             const CodeGrid& grid) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t offset = block * kCodeBlock, count = std::min(kCodeBlock, numel - offset);
    const T* const from = x + offset;
    uint8_t* const to = codes + offset * kBits / 8;
    if constexpr (kBits == 8) {
      if (count == kCodeBlock) {
        encode(from, to, kCodeBlock, rule, grid);
      } else {
        encode(from, to, count, rule, grid);
      }
    } else {
      if (count == kCodeBlock) {
        encode_pairs(from, to, kCodeBlock, kCodeBlock / 2, rule, grid);
      } else {
        encode_pairs(from, to, count, (count + 1) / 2, rule, grid);
      }
    }
  }
}

template <class T>
FK_INLINE void decode(const T* __restrict dy, const uint8_t* __restrict codes, T* __restrict dx, int64_t count,
                      const CodeGrid& grid) {
  for (int64_t i = 0; i < count; ++i) dx[i] = down<T>(up(dy[i]) * grid.value(codes[i]));
}

template <class T>
FK_INLINE void decode_pairs(const T* dy, const uint8_t* codes, T* dx, int64_t count, int64_t half,
                            const CodeGrid& grid) {
  uint8_t low[kCodeBlock / 2], high[kCodeBlock / 2];
  for (int64_t j = 0; j < half; ++j) low[j] = codes[j] & 15;
  for (int64_t j = 0; j < half; ++j) high[j] = codes[j] >> 4;
  decode(dy, low, dx, half, grid);
  decode(dy + half, high, dx + half, count - half, grid);
}

template <int kBits, class T>
FK_INLINE void decode_blocks(const T* dy, const uint8_t* codes, T* dx, int64_t numel, int64_t first, int64_t last,
                             const CodeGrid& grid) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t offset = block * kCodeBlock, count = std::min(kCodeBlock, numel - offset);
    const uint8_t* const from = codes + offset * kBits / 8;
    if constexpr (kBits == 8) {
      if (count == kCodeBlock) {
        decode(dy + offset, from, dx + offset, kCodeBlock, grid);
      } else {
        decode(dy + offset, from, dx + offset, count, grid);
      }
    } else {
      if (count == kCodeBlock) {
        decode_pairs(dy + offset, from, dx + offset, kCodeBlock, kCodeBlock / 2, grid);
      } else {
        decode_pairs(dy + offset, from, dx + offset, count, (count + 1) / 2, grid);
      }
    }
  }
}

}  // namespace freezekit::cpu
