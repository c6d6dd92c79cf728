// Warp collectives: each lane of a mask leaves an operand; the last one to arrive combines them and wakes the others.
// The mask names threads of one warp; those that have ended are counted out, except where the whole warp is needed.
#include "emulator/warp.h"

#include "emulator/tsan.h"

namespace freezekit::emulator {
namespace {

constexpr CollectiveKind kBarrier{"__syncwarp()", false, true, nullptr};

Thread& lane_of(int warp, int lane) { return block.threads[static_cast<size_t>(warp * kWarpSize + lane)]; }

// Runs the collective if all its lanes are there.
bool try_complete(int w, unsigned mask, const CollectiveKind& kind) {
  Warp& warp = block.warps[w];
  if (kind.whole_warp && warp.alive != kFullMask) {
    fail("%s by a warp that is not whole: lanes %08x", kind.name, warp.alive);
  }
  const unsigned lanes = mask & warp.alive;
  if (lanes & ~warp.at_collective) return false;
  void* operands[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (!(lanes >> lane & 1)) continue;
    const Thread& t = lane_of(w, lane);
    if (t.mask != mask || t.kind != &kind) {
      // Another collective, which does not wait for the lanes of this one, may still let the lane come.
      if (!(t.mask & lanes & ~(1u << lane))) return false;
      fail("lanes of a warp meet at different collectives: %s and %s, masks %08x and %08x", t.kind->name, kind.name,
           t.mask, mask);
    }
    operands[lane] = t.operand;
  }
  if (kind.combine) kind.combine(operands);
  if (kind.orders_memory) warp.generation++;
  warp.at_collective &= ~lanes;
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (lanes >> lane & 1) lane_of(w, lane).state = State::ready;
  }
  return true;
}

}  // namespace

void collective(unsigned mask, const CollectiveKind& kind, void* operand) {
  const int me = index_of(*current), w = me / kWarpSize, lane = me % kWarpSize;
  Warp& warp = block.warps[w];
  if (!(mask >> lane & 1)) fail("%s by lane %d, which is not in its mask %08x", kind.name, lane, mask);
  void* tag = tsan_warp_tag(w, warp.generation);
  if (kind.orders_memory) tsan_release(tag);
  current->mask = mask;
  current->kind = &kind;
  current->operand = operand;
  current->state = State::at_collective;
  warp.at_collective |= 1u << lane;
  if (!try_complete(w, mask, kind)) wait(State::at_collective);
  if (kind.orders_memory) tsan_acquire(tag);
}

void complete_collectives_after_exit(int thread) {
  const int w = thread / kWarpSize;
  Warp& warp = block.warps[w];
  warp.alive &= ~(1u << thread % kWarpSize);
  for (int lane = 0; warp.at_collective >> lane; lane++) {
    if (warp.at_collective >> lane & 1) try_complete(w, lane_of(w, lane).mask, *lane_of(w, lane).kind);
    if (lane == kWarpSize - 1) break;
  }
}

int lane() { return index_of(*current) % kWarpSize; }

void warp_barrier(unsigned mask) { collective(mask, kBarrier, nullptr); }

}  // namespace freezekit::emulator
