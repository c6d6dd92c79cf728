// cp.async.bulk.tensor (PTX ISA 9.7.9.25.5.2), tiled and im2col, from global to shared memory, 128-byte swizzle.
//
// im2col walks pixels through the box between the corners, by the traversal strides, w fastest, then h, then images;
// each pixel is read at its place plus the offsets. Whatever is outside of the tensor is zero.
#include "emulator/tensor_copy.h"

#include <cstring>

#include "emulator/block.h"
#include "emulator/half_types.h"
#include "emulator/tsan.h"

namespace freezekit::emulator {

void (*on_tensor_copy)(const TensorCopy&) = nullptr;

namespace {

// Copies of a map of tf32 round to nearest, ties to even (PTX ISA, "Tensor Dimension, size and format"). A NaN
// loses its sign and payload, as was seen on a GPU of sm_120.
uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffe000u;
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu;
}

// One row of 128 bytes; `from` is the element at coordinate `first` of dimension 0, null: all of it is outside.
void land_row(const TensorCopy& copy, size_t row, const char* from, int64_t first) {
  const auto type = static_cast<TensorType>(copy.map.type);
  const size_t size = element_bytes(type);
  char values[kSwizzleBytes] = {};
  for (size_t e = 0; from && e < kSwizzleBytes / size; e++) {
    const int64_t at = first + static_cast<int64_t>(e);
    if (at < 0 || at >= copy.map.sizes[0]) continue;
    tsan_read(from + e * size, size);
    std::memcpy(values + e * size, from + e * size, size);
    counters.global_read_bytes += size;
    if (type != TensorType::tf32) continue;
    uint32_t bits;
    std::memcpy(&bits, values + 4 * e, 4);
    bits = round_to_tf32(bits);
    std::memcpy(values + 4 * e, &bits, 4);
  }
  for (uint32_t chunk = 0; chunk < kSwizzleBytes; chunk += 16) {
    const uint32_t to = swizzle(copy.to + static_cast<uint32_t>(row * kSwizzleBytes) + chunk);
    std::memcpy(shared_pointer(to, 16), values + chunk, 16);
  }
}

bool inside(int64_t at, uint32_t size) { return at >= 0 && at < size; }

void land_tiled(const TensorCopy& copy) {
  const TensorMap& map = copy.map;
  for (size_t row = 0; row < copy.rows(); row++) {
    bool exists = true;
    const char* from =
        map.address + copy.at[0] * static_cast<int64_t>(element_bytes(static_cast<TensorType>(map.type)));
    size_t rest = row;
    for (int i = 1; i < map.rank; i++) {
      const int64_t at = copy.at[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      exists = exists && inside(at, map.sizes[i]);
      from += at * static_cast<int64_t>(map.strides[i - 1]);
    }
    land_row(copy, row, exists ? from : nullptr, copy.at[0]);
  }
}

void land_im2col(const TensorCopy& copy) {
  const TensorMap& map = copy.map;
  int64_t w = copy.at[1], h = copy.at[2], n = copy.at[3];
  for (size_t row = 0; row < copy.rows(); row++) {
    const int64_t x = w + copy.offset[0], y = h + copy.offset[1];
    const bool exists = inside(x, map.sizes[1]) && inside(y, map.sizes[2]) && inside(n, map.sizes[3]);
    const char* from = map.address +
                       copy.at[0] * static_cast<int64_t>(element_bytes(static_cast<TensorType>(map.type))) +
                       x * static_cast<int64_t>(map.strides[0]) + y * static_cast<int64_t>(map.strides[1]) +
                       n * static_cast<int64_t>(map.strides[2]);
    land_row(copy, row, exists ? from : nullptr, copy.at[0]);
    w += map.element_strides[1];
    if (w <= static_cast<int64_t>(map.sizes[1]) - 1 + map.upper[0]) continue;
    w = map.lower[0];
    h += map.element_strides[2];
    if (h <= static_cast<int64_t>(map.sizes[2]) - 1 + map.upper[1]) continue;
    h = map.lower[1];
    n++;
  }
}

void issue(TensorCopy& copy, void* shared, const TensorMap* map, uint64_t* barrier, bool im2col) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || map->magic != kTensorMapMagic) fail("a bulk copy without a tensor map");
  if (map->im2col != im2col) fail("a tiled bulk copy needs a tiled map, an im2col one an im2col map");
  copy.map = *map;
  copy.to = shared_address(shared);
  if (copy.to % 128) fail("a bulk copy writes to a shared address that is not a multiple of 128");
  if (!is_shared(shared, copy.bytes()))
    fail("a bulk copy of %zu bytes does not write inside shared memory", copy.bytes());
  counters.tensor_copies++;
  if (on_tensor_copy) on_tensor_copy(copy);
  tsan_write(shared, copy.bytes());
  std::memset(shared, 0xff, copy.bytes());
  complete_on_mbarrier(barrier, copy);
}

}  // namespace

size_t TensorCopy::rows() const {
  if (map.im2col) return map.pixels;
  size_t rows = 1;
  for (int i = 1; i < map.rank; i++) rows *= map.box[i];
  return rows;
}

void land(const TensorCopy& copy) { copy.map.im2col ? land_im2col(copy) : land_tiled(copy); }

void copy_tiled(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t* at, int rank) {
  if (map->rank != rank) fail("a bulk copy of %d dimensions, its map has %d", rank, map->rank);
  TensorCopy copy{};
  for (int i = 0; i < rank; i++) copy.at[i] = at[i];
  issue(copy, shared, map, barrier, false);
}

// A walk that begins off its box or its grid of strides would visit other pixels than the caller thinks.
void copy_im2col(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t (&at)[4],
                 const uint16_t (&offset)[2]) {
  TensorCopy copy{};
  for (int i = 0; i < 4; i++) copy.at[i] = at[i];
  for (int i = 0; i < 2; i++) {
    copy.offset[i] = offset[i];
    if (offset[i] > 255) fail("an im2col offset of %d, there are 8 bits", offset[i]);
    const int64_t from_corner = at[i + 1] - map->lower[i];
    const int64_t last = static_cast<int64_t>(map->sizes[i + 1]) - 1 + map->upper[i];
    if (from_corner < 0 || at[i + 1] > last || from_corner % map->element_strides[i + 1]) {
      fail("an im2col copy begins at %d, its box is %d to %d", at[i + 1], map->lower[i], static_cast<int>(last));
    }
  }
  issue(copy, shared, map, barrier, true);
}

}  // namespace freezekit::emulator
