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
