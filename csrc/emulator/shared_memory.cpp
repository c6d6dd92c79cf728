// Shared memory of a block: each array an allocation of its own and of its exact size, so that ASan sees what is
// beyond its end, and filled with NaN (all bits set: a NaN in fp64, fp32, bf16 and fp16).
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "emulator/block.h"
#include "emulator/tsan.h"

namespace freezekit::emulator {
namespace {

constexpr size_t kMaxStatic = 48 * 1024;
// What kernels may count on (kernels/device.h), and no more: arrays are at odd multiples.
constexpr size_t kDynamicAlignment = 128, kStaticAlignment = 16;

struct Array {
  const void* key;  // null: dynamic
  char* allocation;
  char* memory;
  size_t bytes;
};

std::vector<Array> arrays;
size_t static_bytes = 0;
// TSan: memory that the next block used again would look like a race with it, so it is freed after the launch.
std::vector<char*> deferred;

char* add_array(const void* key, size_t alignment, size_t bytes) {
  void* allocation = nullptr;
  if (posix_memalign(&allocation, 2 * alignment, alignment + bytes)) throw std::bad_alloc();
  char* memory = static_cast<char*>(allocation) + alignment;
  std::memset(memory, 0xff, bytes);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(allocation, alignment);
#endif
  arrays.push_back({key, static_cast<char*>(allocation), memory, bytes});
  return memory;
}

}  // namespace

void begin_shared_memory(size_t dynamic_bytes) {
  static_bytes = 0;
  if (dynamic_bytes) add_array(nullptr, kDynamicAlignment, dynamic_bytes);
}

void end_shared_memory() {
  for (const Array& array : arrays) {
    if (kThreadSanitizer) {
      deferred.push_back(array.allocation);
    } else {
      std::free(array.allocation);
    }
  }
  arrays.clear();
}

void release_deferred_memory() {
  for (char* allocation : deferred) std::free(allocation);
  deferred.clear();
}

void* dynamic_shared() {
  if (arrays.empty() || arrays[0].key) fail("a kernel uses dynamic shared memory, launched without any");
  return arrays[0].memory;
}

void* static_shared(const void* key, size_t bytes) {
  for (const Array& array : arrays) {
    if (array.key != key) continue;
    tsan_learn_from_host();  // anew: the array is younger than the thread
    return array.memory;
  }
  static_bytes += bytes;
  if (static_bytes > kMaxStatic) fail("%zu bytes of static shared memory, a block has %zu", static_bytes, kMaxStatic);
  const AsHost as_host;
  return add_array(key, kStaticAlignment, bytes);
}

// The window begins so that addresses in it agree with pointers modulo 1024, as on a GPU; the arrays are far apart.
constexpr uint32_t kWindowOfArray = 1 << 18;

uint32_t shared_address(const void* p) {
  const char* at = static_cast<const char*>(p);
  for (size_t i = 0; i < arrays.size(); i++) {
    const Array& array = arrays[i];
    if (at < array.memory || at >= array.memory + array.bytes) continue;
    const auto base = static_cast<uint32_t>(i * kWindowOfArray + reinterpret_cast<uintptr_t>(array.memory) % 1024);
    return base + static_cast<uint32_t>(at - array.memory);
  }
  fail("an address of shared memory is taken of something else");
}

void* shared_pointer(uint32_t address, size_t bytes) {
  const size_t i = address / kWindowOfArray;
  if (i < arrays.size()) {
    char* const at =
        arrays[i].memory + (address % kWindowOfArray) - reinterpret_cast<uintptr_t>(arrays[i].memory) % 1024;
    if (at >= arrays[i].memory && at + bytes <= arrays[i].memory + arrays[i].bytes) return at;
  }
  fail("%zu bytes at shared address %u are outside of the block's arrays", bytes, address);
}

bool is_shared(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (const Array& array : arrays) {
    if (at >= array.memory && at + bytes <= array.memory + array.bytes) return true;
  }
  return false;
}

}  // namespace freezekit::emulator
