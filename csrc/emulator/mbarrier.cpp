// mbarrier objects in shared memory (PTX ISA 9.7.13.15): phases that complete once all arrivals have come and all bytes
// that were expected have landed. What is opaque there is kept here, beside the eight bytes.
#include <memory>
#include <vector>

#include "emulator/block.h"
#include "emulator/tensor_copy.h"
#include "emulator/tsan.h"

namespace freezekit::emulator {

struct Mbarrier {
  uint64_t* address;
  uint32_t arrivals, pending;
  int64_t expected_bytes = 0;  // of this phase, not landed yet
  unsigned phase = 0;
  const Thread* made_by;
  bool seen_by_copies = false;  // a fence of the thread that made it
  std::vector<TensorCopy> copies;
  char tags[2][8] = {};  // by the parity of the phase: see tsan_barrier_tag

  void* tag(unsigned of_phase) { return tags[of_phase & 1]; }
};

namespace {

std::vector<std::unique_ptr<Mbarrier>> barriers;           // of the running block
std::vector<std::unique_ptr<Mbarrier>> of_earlier_blocks;  // TSan: tags must not be used again within a launch

Mbarrier& find(uint64_t* address) {
  tsan_read(address, sizeof *address);
  for (auto& barrier : barriers) {
    if (barrier->address == address) return *barrier;
  }
  fail("an mbarrier is used that was not initialised");
}

bool waits_for(const Thread& t, const Mbarrier& barrier) {
  return t.state == State::at_mbarrier && t.mbarrier == &barrier && (barrier.phase & 1) == t.parity;
}

bool has_waiter(const Mbarrier& barrier) {
  for (const Thread& t : block.threads) {
    if (waits_for(t, barrier)) return true;
  }
  return false;
}

void land_all(Mbarrier& barrier) {
  for (const TensorCopy& copy : barrier.copies) {
    land(copy);
    barrier.expected_bytes -= static_cast<int64_t>(copy.bytes());
  }
  barrier.copies.clear();
}

// Copies land when somebody needs them to, and all that is missing has been issued.
void try_complete(Mbarrier& barrier, bool wanted) {
  if (barrier.pending > 0 || (!wanted && !barrier.copies.empty())) return;
  int64_t in_flight = 0;
  for (const TensorCopy& copy : barrier.copies) in_flight += static_cast<int64_t>(copy.bytes());
  if (in_flight != barrier.expected_bytes) return;
  land_all(barrier);
  for (Thread& t : block.threads) {
    if (waits_for(t, barrier)) t.state = State::ready;
  }
  barrier.pending = barrier.arrivals;
  barrier.phase++;
}

}  // namespace

void complete_on_mbarrier(uint64_t* address, const TensorCopy& copy) {
  Mbarrier& barrier = find(address);
  int64_t in_flight = static_cast<int64_t>(copy.bytes());
  for (const TensorCopy& other : barrier.copies) in_flight += static_cast<int64_t>(other.bytes());
  if (in_flight > barrier.expected_bytes) {
    fail("a bulk copy of %zu bytes completes on an mbarrier that expects %lld more", copy.bytes(),
         static_cast<long long>(barrier.expected_bytes - in_flight) + static_cast<long long>(copy.bytes()));
  }
  if (!barrier.seen_by_copies) fail("a bulk copy completes on an mbarrier whose initialisation was not fenced");
  tsan_release(barrier.tag(barrier.phase));
  {
    const AsHost as_host;  // the queue's memory is not the kernel's
    barrier.copies.push_back(copy);
  }
  if (lands_at_once()) land_all(barrier);
  try_complete(barrier, has_waiter(barrier));
}

void begin_mbarriers() {
  for (auto& barrier : barriers) of_earlier_blocks.push_back(std::move(barrier));
  barriers.clear();
}

void check_mbarriers_at_end() {
  for (const auto& barrier : barriers) {
    if (!barrier->copies.empty()) fail("a block ends with a bulk copy that nobody has waited for");
  }
}

void release_mbarriers() {
  barriers.clear();
  of_earlier_blocks.clear();
}

void mbarrier_init(uint64_t* address, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(address) % 8 || !is_shared(address, 8)) fail("an mbarrier is outside shared memory");
  if (arrivals < 1 || arrivals >= 1u << 20) fail("an mbarrier of %u arrivals", arrivals);
  for (const auto& barrier : barriers) {
    if (barrier->address == address) fail("an mbarrier is initialised twice");
  }
  tsan_write(address, sizeof *address);
  const AsHost as_host;
  barriers.push_back(std::make_unique<Mbarrier>());
  Mbarrier& made = *barriers.back();
  made.address = address, made.arrivals = made.pending = arrivals, made.made_by = current;
}

void fence_mbarriers() {
  for (auto& barrier : barriers) barrier->seen_by_copies |= barrier->made_by == current;
}

void mbarrier_arrive(uint64_t* address, uint32_t bytes) {
  Mbarrier& barrier = find(address);
  if (barrier.pending == 0) fail("an arrival at an mbarrier beyond the %u that a phase has", barrier.arrivals);
  tsan_release(barrier.tag(barrier.phase));
  barrier.expected_bytes += bytes;
  barrier.pending--;
  try_complete(barrier, has_waiter(barrier));
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  if (parity > 1) fail("an mbarrier's parity is %u", parity);
  Mbarrier& barrier = find(address);
  if ((barrier.phase & 1) == parity) try_complete(barrier, true);
  if ((barrier.phase & 1) == parity) {
    current->mbarrier = &barrier;
    current->parity = parity;
    wait(State::at_mbarrier);
  }
  tsan_acquire(barrier.tag(parity));
}

}  // namespace freezekit::emulator
