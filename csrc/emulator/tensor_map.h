// What cuTensorMapEncode* makes, for the emulated build: the same 128 opaque bytes at a multiple of 64, encoded by
// functions that hold callers to the limits that the driver documents (CUDA driver API, "Tensor Map Object Management").
#pragma once

#include <cstdint>

namespace freezekit::emulator {

enum class TensorType : int { f16, bf16, tf32 };

constexpr int kMaxRank = 5;

struct alignas(64) TensorMap {
  const char* address;
  uint64_t strides[kMaxRank - 1];     // bytes, of dimensions 1 and up
  uint32_t sizes[kMaxRank];           // elements; dimension 0 is the innermost
  uint16_t box[kMaxRank];             // tiled: elements of dimension i
  uint8_t element_strides[kMaxRank];  // im2col: the traversal stride
  int8_t lower[2], upper[2];          // im2col: corners of the pixel box along dimensions 1 (w) and 2 (h)
  uint16_t channels, pixels;          // im2col: of one copy
  uint8_t rank, type, im2col;
  uint8_t magic;  // tells a map from other bytes
};
static_assert(sizeof(TensorMap) == 128, "as CUtensorMap");

// Both take the swizzle of 128 bytes, no interleave, zeros outside. False: freezekit_last_error() says what is wrong.
bool encode_tiled(TensorMap* map, TensorType, uint32_t rank, const void* address, const uint64_t* sizes,
                  const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides);
bool encode_im2col(TensorMap* map, TensorType, uint32_t rank, const void* address, const uint64_t* sizes,
                   const uint64_t* strides, const int* lower, const int* upper, uint32_t channels, uint32_t pixels,
                   const uint32_t* element_strides);

}  // namespace freezekit::emulator
