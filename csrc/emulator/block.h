// The running block, for the emulator's own files: its threads, which of them wait for what, and how a thread gives way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/fiber.h"

namespace freezekit::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;  // of a block

enum class State : uint8_t { not_started, ready, at_barrier, at_collective, at_mbarrier, done };

struct PendingCopy;
struct Mbarrier;
struct CollectiveKind;

struct Thread {
  uint3 index = {};
  State state = State::not_started;
  Fiber* fiber = nullptr;  // bound from start to end
  // At a collective:
  unsigned mask = 0;
  const CollectiveKind* kind = nullptr;
  void* operand = nullptr;
  // At an mbarrier, the parity of the phase that is waited for:
  const Mbarrier* mbarrier = nullptr;
  unsigned parity = 0;
  // cp.async: a queue in the order of issue.
  PendingCopy* oldest_copy = nullptr;
  PendingCopy* newest_copy = nullptr;
  int committed_groups = 0;
};

struct Warp {
  unsigned alive = 0, at_collective = 0;  // lanes
  unsigned generation = 0;                // counts barriers
};

struct Block {
  std::vector<Thread> threads;
  Warp warps[kMaxThreads / kWarpSize];
  int alive = 0;
  int at_barrier = 0;
  const char* barrier_file = nullptr;  // where the first of them waits
  int barrier_line = 0;
  unsigned barrier_generation = 0;
};

extern Block block;
extern Thread* current;               // the running thread, null outside of kernels
extern std::mt19937 schedule_random;  // seeded at each launch

// Whether asynchronous work that is issued now is done at once; else as late as its wait allows.
inline bool lands_at_once() {
  return settings.cp_async == CpAsync::eager || (settings.cp_async == CpAsync::mixed && (schedule_random() & 1));
}

inline int index_of(const Thread& t) { return static_cast<int>(&t - block.threads.data()); }

// The running thread waits in `state` until another one makes it ready.
void wait(State state);

// A thread has ended: those that waited for it may go on.
void complete_barrier_after_exit();
void complete_collectives_after_exit(int thread);

// A thread must not end with copies in flight. What a failed launch leaves is forgotten.
void check_no_copies_in_flight();
void forget_copies(Thread&);

// wgmmas: what begins with a block, and that none of the running thread, which ends, is in flight.
void begin_wgmma();
void check_no_wgmma_in_flight();

// mbarriers: of a block; no copy may be in flight when its last thread ends; after a launch.
void begin_mbarriers();
void check_mbarriers_at_end();
void release_mbarriers();

// Shared memory is made before a block runs and released after it. `is_shared`: all bytes are in one array.
void begin_shared_memory(size_t dynamic_bytes);
void end_shared_memory();
void release_deferred_memory();
bool is_shared(const void* p, size_t bytes);
// `bytes` of shared memory at an address in its window of 32 bits; fails where they are not in one array.
void* shared_pointer(uint32_t address, size_t bytes);

}  // namespace freezekit::emulator
