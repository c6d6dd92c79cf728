// How a warp collective is made: ldmatrix and mma use it too.
#pragma once

#include "emulator/block.h"

namespace freezekit::emulator {

constexpr unsigned kFullMask = 0xffffffffu;

// Returns once kind.combine has run over the operands of all lanes of `mask`.
void collective(unsigned mask, const CollectiveKind& kind, void* operand);

}  // namespace freezekit::emulator
