#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "emulator/tensor_copy.h"
#include "emulator/tensor_map.h"
#include "kernels/last_error.h"

namespace freezekit::emulator {
namespace {

__attribute__((format(printf, 1, 2))) bool refuse(const char* format, ...) {
  char text[200], message[240];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::snprintf(message, sizeof message, "tensor map: %s", text);
  set_last_error(message);
  return false;
}

// What both kinds of map share.
bool begin(TensorMap* map, TensorType type, uint32_t rank, const void* address, const uint64_t* sizes,
           const uint64_t* strides, const uint32_t* element_strides) {
  if (reinterpret_cast<uintptr_t>(map) % 64) return refuse("it is off a multiple of 64 bytes");
  if (reinterpret_cast<uintptr_t>(address) % 16) return refuse("the tensor is off a multiple of 16 bytes");
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  map->magic = kTensorMapMagic, map->type = static_cast<uint8_t>(type), map->rank = static_cast<uint8_t>(rank);
  map->address = static_cast<const char*>(address);
  for (uint32_t i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] >= uint64_t{1} << 32) return refuse("size %u is not in [1, 2^32)", i);
    if (element_strides[i] < 1 || element_strides[i] > 8) return refuse("stride %u in elements is not in [1, 8]", i);
    map->sizes[i] = static_cast<uint32_t>(sizes[i]);
    map->element_strides[i] = static_cast<uint8_t>(element_strides[i]);
    if (i == 0) continue;
    const uint64_t stride = strides[i - 1];
    if (stride % 16 || stride >= uint64_t{1} << 40) return refuse("stride %u is not a multiple of 16 below 2^40", i);
    map->strides[i - 1] = stride;
  }
  return true;
}

bool refuse_inner(uint32_t elements, TensorType type) {
  const size_t bytes = elements * element_bytes(type);
  if (bytes == kSwizzleBytes) return true;
  return refuse(bytes > kSwizzleBytes ? "%zu bytes along dimension 0, the swizzle has 128"
                                      : "%zu bytes along dimension 0: only whole rows of 128 are emulated",
                bytes);
}

}  // namespace

bool encode_tiled(TensorMap* map, TensorType type, uint32_t rank, const void* address, const uint64_t* sizes,
                  const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides) {
  if (rank < 1 || rank > kMaxRank) return refuse("a rank of %u", rank);
  if (!begin(map, type, rank, address, sizes, strides, element_strides)) return false;
  for (uint32_t i = 0; i < rank; i++) {
    if (box[i] < 1 || box[i] > 256) return refuse("a box of %u along dimension %u, a copy has 1 to 256", box[i], i);
    if (element_strides[i] != 1) return refuse("tiled copies with strides in elements are not emulated");
    map->box[i] = static_cast<uint16_t>(box[i]);
  }
  return refuse_inner(box[0], type);
}

bool encode_im2col(TensorMap* map, TensorType type, uint32_t rank, const void* address, const uint64_t* sizes,
                   const uint64_t* strides, const int* lower, const int* upper, uint32_t channels, uint32_t pixels,
                   const uint32_t* element_strides) {
  if (rank != 4) return refuse("im2col of rank %u is not emulated", rank);
  if (!begin(map, type, rank, address, sizes, strides, element_strides)) return false;
  map->im2col = 1;
  for (int i = 0; i < 2; i++) {
    if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127) {
      return refuse("corners %d and %d of the pixel box are not in [-128, 127]", lower[i], upper[i]);
    }
    if (static_cast<int64_t>(sizes[i + 1]) - 1 + upper[i] < lower[i]) return refuse("an empty pixel box");
    map->lower[i] = static_cast<int8_t>(lower[i]), map->upper[i] = static_cast<int8_t>(upper[i]);
  }
  if (channels < 1 || channels > 256) return refuse("%u channels a pixel, a copy has 1 to 256", channels);
  if (pixels < 1 || pixels > 1024) return refuse("%u pixels a column, a copy has 1 to 1024", pixels);
  map->channels = static_cast<uint16_t>(channels), map->pixels = static_cast<uint16_t>(pixels);
  return refuse_inner(channels, type);
}

}  // namespace freezekit::emulator
