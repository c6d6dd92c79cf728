// cp.async (PTX ISA 9.7.9.25.3.1): when a copy lands is open between its issue and the wait for its group; until then
// its destination is NaN here, and its source may still be read.
#include <cstring>

#include "emulator/block.h"
#include "emulator/tsan.h"

namespace freezekit::emulator {

struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  bool copy;
  int group;
  PendingCopy* next;
};

namespace {

PendingCopy* spare = nullptr;

PendingCopy* new_copy() {
  if (!spare) {
    const AsHost as_host;
    return new PendingCopy;
  }
  PendingCopy* copy = spare;
  spare = copy->next;
  return copy;
}

void recycle(PendingCopy* copy) {
  copy->next = spare;
  spare = copy;
}

void land(void* to, const void* from, int bytes, bool copy) {
  const size_t size = static_cast<size_t>(bytes);
  tsan_write(to, size);
  if (copy) {
    tsan_read(from, size);
    std::memcpy(to, from, size);
  } else {
    std::memset(to, 0, size);
  }
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, bool copy) {
  const size_t size = static_cast<size_t>(bytes);
  if (reinterpret_cast<uintptr_t>(shared) % size || (copy && reinterpret_cast<uintptr_t>(global) % size)) {
    fail("cp.async of %d bytes: an address is not a multiple of %d", bytes, bytes);
  }
  if (!is_shared(shared, size)) fail("cp.async of %d bytes does not write inside shared memory", bytes);
  counters.cp_async++;
  if (copy) counters.global_read_bytes += size;
  if (lands_at_once()) return land(shared, global, bytes, copy);
  tsan_write(shared, size);
  std::memset(shared, 0xff, size);
  PendingCopy* pending = new_copy();
  *pending = {shared, global, bytes, copy, current->committed_groups, nullptr};
  (current->oldest_copy ? current->newest_copy->next : current->oldest_copy) = pending;
  current->newest_copy = pending;
}

void cp_async_commit() { current->committed_groups++; }

void cp_async_wait(int newest_groups_in_flight) {
  while (PendingCopy* copy = current->oldest_copy) {
    if (copy->group >= current->committed_groups - newest_groups_in_flight) break;
    current->oldest_copy = copy->next;
    land(copy->to, copy->from, copy->bytes, copy->copy);
    recycle(copy);
  }
}

void check_no_copies_in_flight() {
  if (current->oldest_copy) fail("a thread ends with a cp.async that it has not waited for");
}

void forget_copies(Thread& thread) {
  while (PendingCopy* copy = thread.oldest_copy) {
    thread.oldest_copy = copy->next;
    recycle(copy);
  }
}

}  // namespace freezekit::emulator
