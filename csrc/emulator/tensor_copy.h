// A bulk tensor copy in flight, for the emulator's own files.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/tensor_map.h"

namespace freezekit::emulator {

constexpr uint8_t kTensorMapMagic = 0xa7;
constexpr size_t kSwizzleBytes = 128;  // of a row, whose 16-byte chunks are permuted

constexpr size_t element_bytes(TensorType type) { return type == TensorType::tf32 ? 4 : 2; }

// The 128-byte swizzle (PTX ISA, "Swizzling modes"): bits 4 to 6 of an address, xor bits 7 to 9.
constexpr uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct TensorCopy {
  TensorMap map;
  uint32_t to;           // address in the window of shared memory
  int32_t at[kMaxRank];  // coordinates of the first element
  uint16_t offset[2];    // im2col: of w and h

  size_t rows() const;  // of kSwizzleBytes
  size_t bytes() const { return rows() * kSwizzleBytes; }
};

void land(const TensorCopy&);

// The copy's bytes are counted by the barrier once it has landed: at once, or as late as a thread that waits allows.
void complete_on_mbarrier(uint64_t* barrier, const TensorCopy&);

// Called with each copy as it is issued, where a test takes notes.
extern void (*on_tensor_copy)(const TensorCopy&);

}  // namespace freezekit::emulator
