// Division by a number known before launch, as one multiplication and one shift.
//
//   x / d = (high32(x * m) + x) >> s    with s = ceil(log2 d), m = floor(2^32 (2^s - d) / d) + 1,  0 <= x, d < 2^31
//
// (T. Granlund and P. L. Montgomery, Division by Invariant Integers using Multiplication, 1994.) With x and d below
// 2^31 the sum fits 32 bits. The GPU has no integer divide: a plain one costs about twenty instructions.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freezekit {

struct FastDivide {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  FastDivide() = default;

  // Host only: the 64-bit division in here is what the kernels avoid. A divisor of 0 (an empty axis) is taken as 1.
  explicit FastDivide(int32_t d) : divisor(d > 0 ? static_cast<uint32_t>(d) : 1) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  FK_HOST_DEVICE int32_t quotient(int32_t x) const {
    const uint32_t high = static_cast<uint32_t>((uint64_t{static_cast<uint32_t>(x)} * multiplier) >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(x)) >> shift);
  }

  // Returns x / d and stores x mod d.
  FK_HOST_DEVICE int32_t divide(int32_t x, int32_t* remainder) const {
    const int32_t q = quotient(x);
    *remainder = x - q * static_cast<int32_t>(divisor);
    return q;
  }
};

}  // namespace freezekit
