// The running block, for the emulator's own files: its threads, who waits for what, and how a thread gives way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/fiber.h"

namespace freezekit::emulator {

constexpr int kWarpSize = 32;

enum class State : uint8_t { not_started, ready, at_barrier, at_collective, done };

// What a collective does with the operands of its lanes (null where a lane takes no part).
struct CollectiveKind {
  const char* name;
  bool whole_warp;   // 32 lanes, none of which has ended
  bool fences;       // orders memory among its lanes
  void (*combine)(void* const (&operands)[kWarpSize]);
};

// A copy in flight; a thread's copies form a queue in the order of issue.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  bool copy;
  int group;
  PendingCopy* next;
};

struct Thread {
  State state = State::not_started;
  Fiber* fiber = nullptr;  // bound from start to end
  unsigned mask = 0;       // at a collective
  const CollectiveKind* kind = nullptr;
  void* operand = nullptr;
  PendingCopy* oldest_copy = nullptr;
  PendingCopy* newest_copy = nullptr;
  int open_group = 0;      // number of cp.async groups committed so far
};

// Places in memory that TSan's happens-before hangs on. Two by turns: with one, a thread that leaves a barrier would
// also acquire what faster threads release on arriving at the next one, and write-after-read races would not show.
struct SyncTags {
  uint64_t barrier[2];
  uint64_t warp[kWarpSize][2];
};

struct Block {
  std::vector<Thread> threads;
  int alive = 0;
  int at_barrier = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  unsigned barrier_generation = 0;
  unsigned warp_generation[kWarpSize] = {};
  SyncTags* tags = nullptr;
};

extern Block block;
extern Thread* current;       // the running thread, null outside of kernels
extern std::mt19937 random_;  // seeded at each launch

inline int index_of(const Thread& t) { return static_cast<int>(&t - block.threads.data()); }
uint3 coordinates_of(int thread);

// The running thread waits in `state` until another one makes it ready.
void wait(State state);

// Called as a thread ends: what waited for it may go on.
void complete_barrier_after_exit();
void complete_collectives_after_exit(int warp);

// A thread must not end with copies in flight; drops them otherwise.
void check_no_copies_in_flight();
void forget_copies(Thread&);

// Shared memory: made before a block runs, released after it. `is_shared` takes bytes of one array alone.
void begin_shared_memory(size_t dynamic_bytes);
void end_shared_memory();
void release_deferred_memory();
bool is_shared(const void* p, size_t bytes);

}  // namespace freezekit::emulator
