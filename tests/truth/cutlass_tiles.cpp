// CUTLASS's plans at the other tiles of the Hopper kernels; `make test` does without them.
#include "tests/truth/cutlass_plans.h"

// Whether CUTLASS takes the problem (op: 0 fprop, 1 dgrad, 2 wgrad) in tiles of 128 rows by `columns`; maps: A's, B's; copies:
// A's counts[0], B's counts[1].
EXPORT int cutlass_plan(const truth::Problem* p, int columns, truth::Map* maps, truth::Copy* copies, int room,
                        int* counts) {
  const Out out{maps, copies, room, counts};
  return columns == 64 ? plan_tile<_64>(*p, out) : columns == 256 && plan_tile<_256>(*p, out);
}
