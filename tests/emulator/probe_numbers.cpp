// Conversions of the emulator's half types over arrays, for ctypes.
#include "emulator/half_types.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void probe_float_to_half(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __float2half_rn(in[i]).bits;
}
EXPORT void probe_half_to_float(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __half2float({in[i]});
}
EXPORT void probe_float_to_bfloat16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __float2bfloat16_rn(in[i]).bits;
}
EXPORT void probe_bfloat16_to_float(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __bfloat162float({in[i]});
}

// Both halves of a pair: out[0], out[1] = low, high of (x, y) after the way there and back.
EXPORT void probe_pairs(float x, float y, float* halves, float* bfloat16s) {
  const float2 h = __half22float2(__floats2half2_rn(x, y)), b = __bfloat1622float2(__floats2bfloat162_rn(x, y));
  halves[0] = h.x, halves[1] = h.y, bfloat16s[0] = b.x, bfloat16s[1] = b.y;
}
