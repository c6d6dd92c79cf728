// Warp collectives: each lane of a mask leaves an operand; the last one to arrive combines them and wakes the others.
// The mask names threads of one warp; those that have ended are counted out, except where the whole warp is needed.
#include "emulator/warp.h"

#include "emulator/tsan.h"

namespace freezekit::emulator {
namespace {

uint64_t fence_tag;

struct Shuffle {
  uint64_t value, result;
  int source;
};

void combine_shuffles(void* const (&operands)[kWarpSize]) {
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (!operands[lane]) continue;
    auto* mine = static_cast<Shuffle*>(operands[lane]);
    if (!operands[mine->source]) fail("lane %d shuffles from lane %d, which takes no part", lane, mine->source);
    mine->result = static_cast<Shuffle*>(operands[mine->source])->value;
  }
}

struct Ballot {
  bool predicate;
  unsigned result;
};

void combine_ballots(void* const (&operands)[kWarpSize]) {
  unsigned result = 0;
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (operands[lane] && static_cast<Ballot*>(operands[lane])->predicate) result |= 1u << lane;
  }
  for (void* operand : operands) {
    if (operand) static_cast<Ballot*>(operand)->result = result;
  }
}

constexpr CollectiveKind kBarrier{"__syncwarp()", false, true, nullptr};
constexpr CollectiveKind kShuffle{"a shuffle", false, false, combine_shuffles};
constexpr CollectiveKind kBallot{"__ballot_sync()", false, false, combine_ballots};

Thread* lane_of(int warp, int lane) {
  const size_t i = static_cast<size_t>(warp) * kWarpSize + static_cast<size_t>(lane);
  return i < block.threads.size() ? &block.threads[i] : nullptr;
}

// Runs the collective if all its lanes are there.
bool try_complete(int warp, unsigned mask, const CollectiveKind& kind) {
  void* operands[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (!(mask >> lane & 1)) continue;
    Thread* t = lane_of(warp, lane);
    if (!t || t->state == State::done) {
      if (kind.whole_warp) fail("%s without lane %d, which has ended", kind.name, lane);
      continue;
    }
    if (t->state != State::at_collective) return false;
    if (t->mask != mask || t->kind != &kind) {
      // Another collective that does not wait for the lanes of this one may still let the lane come.
      if (!(t->mask & mask & ~(1u << lane))) return false;
      fail("lanes of a warp meet at different collectives: %s and %s, masks %08x and %08x", t->kind->name, kind.name,
           t->mask, mask);
    }
    operands[lane] = t->operand;
  }
  if (kind.combine) kind.combine(operands);
  if (kind.fences) block.warp_generation[warp]++;
  for (int lane = 0; lane < kWarpSize; lane++) {
    Thread* t = lane_of(warp, lane);
    if (t && t->state == State::at_collective && t->mask == mask && t->kind == &kind) t->state = State::ready;
  }
  return true;
}

}  // namespace

void collective(unsigned mask, const CollectiveKind& kind, void* operand) {
  const int me = index_of(*current), warp = me / kWarpSize, lane = me % kWarpSize;
  if (!(mask >> lane & 1)) fail("%s by lane %d, which is not in its mask %08x", kind.name, lane, mask);
  void* tag = nullptr;
  if (kind.fences && block.tags) {
    tag = &block.tags->warp[warp][block.warp_generation[warp] & 1];
    tsan_release(tag);
  }
  current->mask = mask;
  current->kind = &kind;
  current->operand = operand;
  current->state = State::at_collective;
  if (!try_complete(warp, mask, kind)) wait(State::at_collective);
  if (tag) tsan_acquire(tag);
}

void complete_collectives_after_exit(int warp) {
  for (int lane = 0; lane < kWarpSize; lane++) {
    Thread* t = lane_of(warp, lane);
    if (t && t->state == State::at_collective) try_complete(warp, t->mask, *t->kind);
  }
}

int lane() { return index_of(*current) % kWarpSize; }

void warp_barrier(unsigned mask) { collective(mask, kBarrier, nullptr); }

uint64_t shuffle(unsigned mask, uint64_t value, int source_lane) {
  Shuffle operand{value, 0, source_lane & (kWarpSize - 1)};
  collective(mask, kShuffle, &operand);
  return operand.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Ballot operand{predicate, 0};
  collective(mask, kBallot, &operand);
  return operand.result;
}

// One tag for all: what is written before a fence is seen after any later fence.
void memory_fence() {
  tsan_acquire(&fence_tag);
  tsan_release(&fence_tag);
}

}  // namespace freezekit::emulator
