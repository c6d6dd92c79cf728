// Shared memory of a block: each array an allocation of its own and of its exact size, so that ASan sees what lies
// beyond its end, and filled with NaN (all bits set: a NaN in fp64, fp32, bf16 and fp16).
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "emulator/block.h"

namespace freezekit::emulator {
namespace {

constexpr size_t kAlignment = 1024;  // no less than any kernel asks for
constexpr size_t kMaxStatic = 48 * 1024;

struct Array {
  const void* key;  // null: dynamic
  char* memory;
  size_t bytes;
};

std::vector<Array> arrays;
size_t static_bytes = 0;
// TSan: an address used again by the next block would look like a race with it, so it is freed after the launch.
std::vector<void*> deferred;

char* add_array(const void* key, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes)) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  arrays.push_back({key, static_cast<char*>(memory), bytes});
  return static_cast<char*>(memory);
}

}  // namespace

void begin_shared_memory(size_t dynamic_bytes) {
  static_bytes = 0;
  if (dynamic_bytes) add_array(nullptr, dynamic_bytes);
}

void end_shared_memory() {
  for (const Array& array : arrays) {
    if (kThreadSanitizer) {
      deferred.push_back(array.memory);
    } else {
      std::free(array.memory);
    }
  }
  arrays.clear();
}

void release_deferred_memory() {
  for (void* memory : deferred) std::free(memory);
  deferred.clear();
}

void* dynamic_shared() {
  if (arrays.empty() || arrays[0].key) fail("a kernel uses dynamic shared memory, launched without any");
  return arrays[0].memory;
}

void* static_shared(const void* key, size_t bytes) {
  for (const Array& array : arrays) {
    if (array.key == key) return array.memory;
  }
  static_bytes += bytes;
  if (static_bytes > kMaxStatic) fail("%zu bytes of static shared memory, a block has %zu", static_bytes, kMaxStatic);
  return add_array(key, bytes);
}

bool is_shared(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (const Array& array : arrays) {
    if (at >= array.memory && at + bytes <= array.memory + array.bytes) return true;
  }
  return false;
}

}  // namespace freezekit::emulator
