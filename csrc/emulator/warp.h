// How a warp collective is made: barriers, ldmatrix and mma.
#pragma once

#include "emulator/block.h"

namespace freezekit::emulator {

constexpr unsigned kFullMask = 0xffffffffu;

struct CollectiveKind {
  const char* name;
  bool whole_warp;     // needs all 32 lanes; else those that have ended are counted out
  bool orders_memory;  // among its lanes
  // What it does with the operands of its lanes, null where a lane takes no part.
  void (*combine)(void* const (&operands)[kWarpSize]);
};

// Leaves `operand` for kind.combine, and returns once it has run, by the last lane of `mask` to come.
void collective(unsigned mask, const CollectiveKind& kind, void* operand);

}  // namespace freezekit::emulator
