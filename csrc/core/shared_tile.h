// Tiles of operands in shared memory as bulk tensor copies lay them and wgmma reads them: rows of 128 bytes under the
// 128-byte swizzle, and the 64-bit descriptors that name them (PTX ISA, "Matrix Descriptor Format").
//
// Eight rows are a swizzle atom of 1024 bytes, which begins at a multiple of that; chunk c of 16 bytes of row r of an atom
// is at slot c ^ r. A descriptor is linear: the hardware permutes the addresses that it makes.
//
//   K-major   a row is one row m (column j) of the operand, 128 bytes along the reduction
//   MN-major  a row is one value of the reduction, 128 bytes along m (or j); wider tiles are panels beside each other
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freezekit {

constexpr uint32_t kTileRow = 128;  // bytes
constexpr uint32_t kSwizzleAtom = 8 * kTileRow;
constexpr uint32_t kWgmmaDepthBytes = 32;  // of one wgmma along the reduction

// The shared address that a bulk copy gives the byte at linear address `at`.
FK_HOST_DEVICE constexpr uint32_t swizzled(uint32_t at) { return at ^ ((at >> 7 & 7) << 4); }

// leading and stride are in bytes, multiples of 16.
FK_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t start, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return static_cast<uint64_t>(start >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | kSwizzle128;
}

// Step `step` of a K-major tile, whose rows hold four of them. Atoms of eight rows follow each other. `leading` is not
// used under a swizzle; the manual has it 1 (times 16).
FK_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t tile, int32_t step) {
  return matrix_descriptor(tile + static_cast<uint32_t>(step) * kWgmmaDepthBytes, 16, kSwizzleAtom);
}

// Step `step` of an MN-major tile of 16-bit values, 16 of the reduction, which are two atoms. `panel` bytes are between
// panels of 64 values along m or j.
FK_HOST_DEVICE constexpr uint64_t mn_major_descriptor(uint32_t tile, uint32_t panel, int32_t step) {
  return matrix_descriptor(tile + static_cast<uint32_t>(step) * 2 * kSwizzleAtom, panel, kSwizzleAtom);
}

}  // namespace freezekit
