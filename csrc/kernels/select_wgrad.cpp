// Which config of a family a wgrad runs, and into how many slices its reduction is cut. Pure host code.
//
// The slices fill the device, so that a tile is judged by its padding and its rate alone.
#include <algorithm>

#include "kernels/select.h"

namespace freezekit {
namespace {

// Into how many slices a wgrad's reduction over positions is cut: the number of the least estimated time.
//
// Times are in bytes that a multiprocessor moves from or to memory meanwhile, so that work and partial sums compare:
//
//   time(split_k) = blocks of the fullest multiprocessor * positions of a slice * bytes_per_position
//                 + bytes of partial sums, written and read, of a multiprocessor
//
// The rates behind it are those of data sheets, not measured ones.
struct SplitCosts {
  int64_t blocks;             // of one slice
  double bytes_per_position;  // moved while one block adds one position
  int64_t slice_bytes;        // partial sums of one slice
  int64_t least_positions;    // of a slice
  int64_t resident;           // blocks that between them keep a multiprocessor busy
};

// Products in the time of a byte: sm_80 multiplies 1024 pairs of 16 bits, half as many through tf32, 64 of fp32 and 32
// of fp64 a clock and multiprocessor, and gets 13 bytes (2.0 TB/s over 108 at 1.41 GHz); sm_90's numbers have about the
// same ratios, but twice as many products where wgmma feeds its tensor cores.
constexpr double kProductsPerByte16 = 80, kProductsPerByteTf32 = 40, kProductsPerByteWgmma = 160;
constexpr double kProductsPerByteF32 = 5, kProductsPerByteF64 = 2.5;

constexpr int64_t kMaxSplitBytes = int64_t{64} << 20;

// Blocks that take turns hide each other's waits: each one that is missing is assumed to cost 0.4 of a block's time.
// Starting a block and filling its ring of copies is as much as this many positions.
constexpr double kMissing = 0.4;
constexpr int64_t kPositionsToStart = 64;

double estimated_split_time(const SplitCosts& costs, int64_t split_k, int64_t positions, int64_t sm_count) {
  const int64_t fullest = (costs.blocks * split_k + sm_count - 1) / sm_count;
  const int64_t missing = (costs.resident - fullest % costs.resident) % costs.resident;
  const double rounds = static_cast<double>(fullest) + kMissing * static_cast<double>(missing);
  const int64_t slice = (positions + split_k - 1) / split_k + kPositionsToStart;
  const double sums = split_k > 1 ? 2.0 * static_cast<double>(split_k * costs.slice_bytes) / sm_count : 0;
  return rounds * static_cast<double>(slice) * costs.bytes_per_position + sums;
}

int64_t choose_split_k(const SplitCosts& costs, int64_t positions, int sm_count_or_none) {
  constexpr int64_t kMostBlocks = 8;  // a multiprocessor; more only add partial sums
  const int64_t sm_count = std::max(sm_count_or_none, 1);
  const int64_t by_memory = kMaxSplitBytes / std::max<int64_t>(costs.slice_bytes, 1);
  const int64_t limit = std::min({positions / costs.least_positions, by_memory, kMaxGridYZ});
  int64_t best = 1;
  double best_time = estimated_split_time(costs, 1, positions, sm_count);
  for (int64_t blocks = 1; blocks <= kMostBlocks; ++blocks) {
    // As many slices as leave no multiprocessor with more blocks than that.
    const int64_t split_k = std::min(blocks * sm_count / std::max<int64_t>(costs.blocks, 1), limit);
    if (split_k <= best) continue;
    const double time = estimated_split_time(costs, split_k, positions, sm_count);
    if (time < best_time) best = split_k, best_time = time;
  }
  return best;
}

// Smaller slices than these cost more in the ordered reduce than they win in blocks. A depthwise slice reads and writes
// 8 bytes per tap for every 4 bytes or more per position: an eighth of the traffic at most, at 16 positions per tap.
constexpr int64_t kMinPositionsPerSlice = 128;
constexpr int64_t kMinDepthwisePositionsPerTap = 16;
// Blocks of a multiprocessor that hide each other's waits; the GEMM's ring of copies hides part of its own.
constexpr int64_t kResidentGemm = 2, kResidentHopper = 1, kResidentOthers = 4;

void split(Selection* selection, const Conv2dProblem& p, const Target& target, const SplitCosts& costs) {
  selection->split_k = static_cast<int>(choose_split_k(costs, p.n * p.p * p.q, target.sm_count));
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
  split(selection, p, target,
        {blocks, tiled ? 128.0 : 64.0 * size_of(dtype), p.filter_numel() * accumulator_bytes(dtype),
         std::max(kMinPositionsPerSlice, kMinDepthwisePositionsPerTap * p.r * p.s), kResidentOthers});
}

}  // namespace freezekit
