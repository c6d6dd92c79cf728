// Which kernel runs, and why. Pure host code: no device, no CUDA header.
#include <algorithm>

#include "kernels/families.h"

namespace freezekit {
namespace {

// Smaller slices than this cost more in the ordered reduce than they win in blocks.
constexpr int64_t kMinPositionsPerSlice = 128;
constexpr int64_t kBlocksPerMultiprocessor = 4;
constexpr int64_t kMaxSplitBytes = int64_t{64} << 20;

Selection unsupported(const char* reason) {
  Selection selection;
  selection.reason = reason;
  return selection;
}

// Slices of a wgrad reduction such that the grid fills the device, within a bounded workspace.
int choose_split_k(const Conv2dProblem& p, int64_t blocks, int64_t accumulator_bytes, const Target& target) {
  const int64_t positions = p.n * p.p * p.q, wanted = kBlocksPerMultiprocessor * std::max(target.sm_count, 1);
  const int64_t by_grid = (wanted + blocks - 1) / std::max<int64_t>(blocks, 1);
  const int64_t by_length = positions / kMinPositionsPerSlice;
  const int64_t by_memory = kMaxSplitBytes / std::max<int64_t>(p.filter_numel() * accumulator_bytes, 1);
  return static_cast<int>(std::max<int64_t>(1, std::min({by_grid, by_length, by_memory, kMaxGridYZ})));
}

Selection select_direct_gather(Operator op, const Conv2dProblem& p) {
  const Gather g = make_gather(op, p);
  Selection selection;
  selection.config = g.out_c >= 32 ? 0 : 1;
  if (gather_blocks(g, kDirectGatherTiles[selection.config]) > kMaxGridX) {
    return unsupported("more output tiles than a grid holds");
  }
  if (g.phases_h > kMaxGridYZ || g.phases_w > kMaxGridYZ) return unsupported("a stride beyond 65535");
  selection.family = Family::direct;
  const bool fprop = op == Operator::fprop;
  selection.kernel = selection.config == 0 ? (fprop ? "direct_fprop_64x64" : "direct_dgrad_64x64")
                                           : (fprop ? "direct_fprop_128x8" : "direct_dgrad_128x8");
  selection.reason = selection.config == 0 ? "at least 32 output channels a group" : "few output channels a group";
  return selection;
}

Selection select_direct_wgrad(const Conv2dProblem& p, DType dtype, const Target& target) {
  Selection selection;
  selection.config = p.k_per_group() >= 32 ? 0 : 1;
  const int64_t blocks = wgrad_blocks(p, kDirectWgradTiles[selection.config]);
  if (blocks > kMaxGridX) return unsupported("more output tiles than a grid holds");
  const int64_t accumulator_bytes = dtype == DType::f64 ? 8 : 4;
  selection.family = Family::direct;
  selection.split_k = choose_split_k(p, blocks, accumulator_bytes, target);
  if (selection.split_k > 1) {
    selection.workspace_bytes = static_cast<size_t>(selection.split_k * p.filter_numel() * accumulator_bytes);
  }
  selection.kernel = selection.config == 0 ? "direct_wgrad_64x64" : "direct_wgrad_16x64";
  selection.reason = selection.config == 0 ? "at least 32 output channels a group" : "few output channels a group";
  return selection;
}

}  // namespace

Selection select(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (!fits_int32(p)) return unsupported("sizes, positions or filter elements beyond 2^30");
  return op == Operator::wgrad ? select_direct_wgrad(p, dtype, target) : select_direct_gather(op, p);
}

const char* to_string(Status status) {
  switch (status) {
    case Status::success:
      return "success";
    case Status::unsupported:
      return "no kernel supports this problem";
    case Status::invalid_argument:
      return "an argument does not fit the kernel";
    case Status::launch_failed:
      return "the launch failed";
  }
  return "unknown status";
}

}  // namespace freezekit
