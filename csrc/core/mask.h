// Bit masks over the elements of a tensor: bit i of word j is element 32 * j + i in memory order.
//
// On a little-endian machine, as every GPU is, byte b of a mask therefore holds elements 8 * b ... 8 * b + 7, so a run
// of eight elements that begins at a multiple of 8 owns a byte: it can be stored without touching its neighbours.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freezekit {

FK_HOST_DEVICE constexpr int64_t mask_words(int64_t numel) { return (numel + 31) / 32; }

// Up to 32 bits from `element` on; `count` of them are wanted, the rest of the result is 0. Reads only words that hold
// wanted bits.
FK_HOST_DEVICE uint32_t mask_run(const uint32_t* mask, int64_t element, int32_t count) {
  const int32_t shift = static_cast<int32_t>(element & 31);
  uint32_t bits = mask[element >> 5] >> shift;
  if (shift + count > 32) bits |= mask[(element >> 5) + 1] << (32 - shift);
  return count == 32 ? bits : bits & ((1u << count) - 1);
}

// The two words that `count` bits from `element` on fall into, to be or-ed into mask[element / 32] and the word after
// it; the second is 0 unless the run straddles them. Bits from `count` on must be 0.
struct MaskParts {
  uint32_t first, second;
};

FK_HOST_DEVICE MaskParts split_mask_run(uint32_t bits, int64_t element, int32_t count) {
  const int32_t shift = static_cast<int32_t>(element & 31);
  return {bits << shift, shift + count > 32 ? bits >> (32 - shift) : 0u};
}

}  // namespace freezekit
