// mbarriers, for the emulator's own files.
#pragma once

#include "emulator/tensor_copy.h"

namespace freezekit::emulator {

// The copy's bytes are counted by the barrier once it has landed: at once, or as late as a thread that waits allows.
void complete_on_mbarrier(uint64_t* barrier, const TensorCopy&);

void begin_mbarriers();         // of a block
void check_mbarriers_at_end();  // no copy may be in flight when the last thread of a block ends
void release_mbarriers();       // after a launch

}  // namespace freezekit::emulator
