// What the two halves of select() share: select.cpp finds the family, and the config of fprop and dgrad;
// select_wgrad.cpp the config of a wgrad and the slices of its reduction.
#pragma once

#include "kernels/families.h"

namespace freezekit {

constexpr const char* kHopperReason =
    "asked for: wgmma and bulk tensor copies of sm_90a, emulated but never run on hardware";

inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

inline Selection unsupported(const char* reason) {
  Selection selection;
  selection.reason = reason;
  return selection;
}

// The config of the least estimated time: rounds of blocks, times the work of a tile, over the share of the tensor
// cores' rate that a tile of that size can keep busy. The shares are estimates from the tiles' ratio of products to
// loads, not measurements; a tile beyond the last share is never the answer.
template <int kTiles, int kConfigs, class Rounds>
int fastest_tile(const Tile (&tiles)[kTiles], const double (&shares)[kConfigs], const Rounds& rounds_of) {
  static_assert(kConfigs <= kTiles, "a share for every tile at most");
  int best = 0;
  double best_time = 0;
  for (int config = 0; config < kConfigs; ++config) {
    const Tile tile = tiles[config];
    const double time = static_cast<double>(rounds_of(tile)) * tile.rows * tile.columns / shares[config];
    if (config == 0 || time < best_time) best = config, best_time = time;
  }
  return best;
}

// What a launch needs beside its tensors: dgrad's filter, or sums of slices.
size_t workspace_bytes(Operator, const Selection&, const Conv2dProblem&, DType);

// Of problems that the family takes.
Selection select_direct_wgrad(const Conv2dProblem&, DType, const Target&);
Selection select_wgrad_gemm(const Conv2dProblem&, DType, const Target&);
Selection select_hopper_wgrad(const Conv2dProblem&, const Target&);
void split_depthwise_wgrad(Selection*, const Conv2dProblem&, DType, const Target&);

}  // namespace freezekit
