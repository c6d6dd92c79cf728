#pragma once

struct __half {};
inline float __half2float(__half) { return 0; }
inline __half __float2half_rn(float) { return {}; }
