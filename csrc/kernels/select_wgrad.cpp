// Which config of a family a wgrad runs, and into how many slices its reduction is cut. Pure host code.
//
// The slices fill the device, so that a tile is judged by its padding and its rate alone.
#include <algorithm>

#include "kernels/select.h"
#include "kernels/split_k.h"

namespace freezekit {
namespace {

// Smaller slices than these cost more in the ordered reduce than they win in blocks. A depthwise slice reads and writes
// 8 bytes per tap for every 4 bytes or more per position: an eighth of the traffic at most, at 16 positions per tap.
constexpr int64_t kMinPositionsPerSlice = 128;
constexpr int64_t kMinDepthwisePositionsPerTap = 16;
// Blocks of a multiprocessor that hide each other's waits; the GEMM's ring of copies hides part of its own.
constexpr int64_t kResidentGemm = 2, kResidentHopper = 1, kResidentOthers = 4;

int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

void split(Selection* selection, const Conv2dProblem& p, const Target& target, const SplitCosts& costs) {
  const int64_t split_k = choose_split_k(costs, p.n * p.p * p.q, target.sm_count);
  selection->split_k = static_cast<int>(split_k);
  selection->workspace_bytes = split_k > 1 ? static_cast<size_t>(split_k * costs.slice_bytes) : 0;
}

}  // namespace

Selection select_direct_wgrad(const Conv2dProblem& p, DType dtype, const Target& target) {
  Selection selection;
  selection.config = p.k_per_group() >= 32 ? 0 : 1;
  const Tile tile = kDirectWgradTiles[selection.config];
  const int64_t blocks = wgrad_blocks(p, tile);
  if (blocks > kMaxGridX) return unsupported("more output tiles than a grid holds");
  selection.family = Family::direct;
  const double products_per_byte = dtype == DType::f64 ? kProductsPerByteF64 : kProductsPerByteF32;
  split(&selection, p, target,
        {blocks, tile.rows * tile.columns / products_per_byte, p.filter_numel() * accumulator_bytes(dtype),
         kMinPositionsPerSlice, kResidentOthers});
  selection.kernel = selection.config == 0 ? "direct_wgrad_64x64" : "direct_wgrad_16x64";
  selection.reason = selection.config == 0 ? "at least 32 output channels per group" : "few output channels per group";
  return selection;
}

Selection select_wgrad_gemm(const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[] = {"implicit_gemm_wgrad_128x128", "implicit_gemm_wgrad_64x128",
                                      "implicit_gemm_wgrad_64x64"};
  constexpr double kShares[] = {1.0, 0.85, 0.7};
  const bool whole_chunks = p.c_per_group() * size_of(dtype) % 16 == 0 && p.k_per_group() * size_of(dtype) % 16 == 0;
  Selection selection;
  selection.family = Family::implicit_gemm;
  const auto blocks_of = [&](const Tile& tile) { return wgrad_blocks(p, tile); };
  selection.config = whole_chunks ? fastest_tile(kWgradGemmTiles, kShares, blocks_of) : kWgradGemmSmallest;
  selection.kernel = names[selection.config];
  selection.reason =
      whole_chunks ? "tensor cores, 16-byte chunks of channels" : "channels that are not whole 16-byte chunks";
  const Tile tile = kWgradGemmTiles[selection.config];
  const double products_per_byte = dtype == DType::f32 ? kProductsPerByteTf32 : kProductsPerByte16;
  split(&selection, p, target,
        {blocks_of(tile), tile.rows * tile.columns / products_per_byte, p.filter_numel() * accumulator_bytes(dtype),
         kMinPositionsPerSlice, kResidentGemm});
  return selection;
}

Selection select_hopper_wgrad(const Conv2dProblem& p, const Target& target) {
  constexpr double kShares[] = {1.0, 0.9, 0.7};
  static const char* const names[] = {"hopper_wgrad_128x256", "hopper_wgrad_128x128", "hopper_wgrad_128x64"};
  const auto blocks_of = [&](const Tile& tile) {
    return (p.k_per_group() + tile.rows - 1) / tile.rows *
           ((hopper_wgrad_panels(p) * 64 + tile.columns - 1) / tile.columns) * p.groups;
  };
  Selection selection;
  selection.family = Family::hopper;
  selection.config = fastest_tile(kHopperTiles, kShares, blocks_of);
  selection.kernel = names[selection.config];
  selection.reason = kHopperReason;
  const Tile tile = kHopperTiles[selection.config];
  split(&selection, p, target,
        {blocks_of(tile), tile.rows * tile.columns / kProductsPerByteWgmma, p.filter_numel() * 4, kMinPositionsPerSlice,
         kResidentHopper});
  return selection;
}

void split_depthwise_wgrad(Selection* selection, const Conv2dProblem& p, DType dtype, const Target& target) {
  // 64 bytes of channels per block, or 32 channels of one tap; both read as much of x as of dy.
  const bool tiled = selection->config == kDepthwiseTiled;
  const int64_t blocks = tiled ? (p.c * size_of(dtype) + 63) / 64 : (p.k + 31) / 32 * p.r * p.s;
  const int64_t slice_bytes = p.filter_numel() * accumulator_bytes(dtype);
  split(selection, p, target,
        {blocks, tiled ? 128.0 : 64.0 * size_of(dtype), slice_bytes,
         std::max(kMinPositionsPerSlice, kMinDepthwisePositionsPerTap * p.r * p.s), kResidentOthers});
  selection->workspace_bytes = static_cast<size_t>(selection->split_k * slice_bytes);
}

}  // namespace freezekit
