// CuTe's layouts, and CUTLASS's plans at a tile of 128 columns: one file, since reading the headers is what takes long.
#include "tests/truth/cutlass_plans.h"
//
#include "tests/truth/cute_layouts.h"

// How the driver numbers CuTe's type of a kind: 0 bf16, 1 f16, 2 tf32.
EXPORT int cutlass_type(int kind) {
  using namespace TMA;
  if (kind == 2) return to_CUtensorMapDataType<tfloat32_t>();
  return kind == 1 ? to_CUtensorMapDataType<half_t>() : to_CUtensorMapDataType<bfloat16_t>();
}

// Whether CUTLASS takes the problem (op: 0 fprop, 1 dgrad, 2 wgrad) in tiles of 128 rows by `columns`; maps: A's, B's; copies:
// A's counts[0], B's counts[1].
EXPORT int cutlass_plan(const truth::Problem* p, int columns, truth::Map* maps, truth::Copy* copies, int room,
                        int* counts) {
  const Out out{maps, copies, room, counts};
  return columns == 128 && plan_tile<_128>(*p, out);
}
