// Which kernel runs, and why. Pure host code: no device, no CUDA header.
#include <algorithm>

#include "kernels/families.h"
#include "kernels/split_k.h"

namespace freezekit {
namespace {

// Smaller slices than these cost more in the ordered reduce than they win in blocks. A depthwise slice reads and writes
// 8 bytes a tap for every 4 bytes or more a position: at 16 positions a tap that is an eighth of the traffic at most.
constexpr int64_t kMinPositionsPerSlice = 128;
constexpr int64_t kMinDepthwisePositionsPerTap = 16;
// Blocks of a multiprocessor that hide each other's waits; the GEMM's ring of copies hides part of its own.
constexpr int64_t kResidentGemm = 2, kResidentHopper = 1, kResidentOthers = 4;

int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

Selection unsupported(const char* reason) {
  Selection selection;
  selection.reason = reason;
  return selection;
}

void split(Selection* selection, const Conv2dProblem& p, const Target& target, const SplitCosts& costs) {
  const int64_t split_k = choose_split_k(costs, p.n * p.p * p.q, target.sm_count);
  selection->split_k = static_cast<int>(split_k);
  selection->workspace_bytes = split_k > 1 ? static_cast<size_t>(split_k * costs.slice_bytes) : 0;
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
  const Tile tile = kDirectWgradTiles[selection.config];
  const int64_t blocks = wgrad_blocks(p, tile);
  if (blocks > kMaxGridX) return unsupported("more output tiles than a grid holds");
  selection.family = Family::direct;
  const double products_per_byte = dtype == DType::f64 ? kProductsPerByteF64 : kProductsPerByteF32;
  split(&selection, p, target,
        {blocks, tile.rows * tile.columns / products_per_byte, p.filter_numel() * accumulator_bytes(dtype),
         kMinPositionsPerSlice, kResidentOthers});
  selection.kernel = selection.config == 0 ? "direct_wgrad_64x64" : "direct_wgrad_16x64";
  selection.reason = selection.config == 0 ? "at least 32 output channels a group" : "few output channels a group";
  return selection;
}

// Channels of a group from which on a tensor-core tile is worth its padding.
constexpr int32_t kMinGroupChannels = 16;

bool has_tensor_core_type(DType dtype, const Target& target) {
  return dtype == DType::bf16 || dtype == DType::f16 || (dtype == DType::f32 && target.allow_tf32);
}

// The config of the least estimated time: rounds of blocks over the device, times the work of a tile, over the share of
// the tensor cores' rate that a tile of that size can keep busy. The shares are estimates from the tiles' ratio of
// products to loads, not measurements.
int choose_gemm_tile(const Gather& g, const Target& target) {
  constexpr double kShare[] = {1.0, 0.85, 0.7, 0.6};
  int best = 0;
  double best_time = 0;
  for (int config = 0; config < kImplicitGemmElements; ++config) {
    const Tile tile = kImplicitGemmTiles[config];
    const int64_t blocks = gather_blocks(g, tile) * g.phases_h * g.phases_w;
    const int64_t rounds = (blocks + std::max(target.sm_count, 1) - 1) / std::max(target.sm_count, 1);
    const double time = static_cast<double>(rounds) * tile.rows * tile.columns / kShare[config];
    if (config == 0 || time < best_time) best = config, best_time = time;
  }
  return best;
}

// Half a k-tile or panel: with fewer bytes of channels most of a product would be with zeros.
constexpr int64_t kMinHopperChannelBytes = 64;
constexpr const char* kHopperReason = "asked for: wgmma and bulk tensor copies of sm_90a, emulated but never run on hardware";

bool hopper_is_chosen(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (!target.hopper || target.sm != 90 || !has_tensor_core_type(dtype, target)) return false;
  const int64_t channels = op == Operator::dgrad ? p.k_per_group() : p.c_per_group();
  if (!hopper_takes(op, p, dtype) || channels * size_of(dtype) < kMinHopperChannelBytes) return false;
  if (op == Operator::wgrad) return true;  // the launch bounds the grid
  const Gather g = make_gather(op, p);
  return gather_blocks(g, kHopperTiles[2]) * g.phases_h * g.phases_w <= kMaxGridX;
}

// As choose_gemm_tile; the shares are estimates from the tiles' ratio of products to bytes copied.
template <class Blocks>
int choose_hopper_tile(const Target& target, const Blocks& blocks_of) {
  constexpr double kShare[] = {1.0, 0.9, 0.7};
  const int64_t at_once = std::max(target.sm_count, 1);
  int best = 0;
  double best_time = 0;
  for (int config = 0; config < 3; ++config) {
    const Tile tile = kHopperTiles[config];
    const double rounds = static_cast<double>((blocks_of(tile) + at_once - 1) / at_once);
    const double time = rounds * tile.rows * tile.columns / kShare[config];
    if (config == 0 || time < best_time) best = config, best_time = time;
  }
  return best;
}

Selection select_hopper_gemm(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[2][3] = {{"hopper_fprop_128x256", "hopper_fprop_128x128", "hopper_fprop_128x64"},
                                          {"hopper_dgrad_128x256", "hopper_dgrad_128x128", "hopper_dgrad_128x64"}};
  const Gather g = make_gather(op, p);
  Selection selection;
  selection.family = Family::hopper;
  selection.config = choose_hopper_tile(
      target, [&](const Tile& tile) { return gather_blocks(g, tile) * g.phases_h * g.phases_w; });
  selection.kernel = names[op == Operator::dgrad][selection.config];
  selection.reason = kHopperReason;
  if (op == Operator::dgrad) selection.workspace_bytes = static_cast<size_t>(p.filter_numel() * size_of(dtype));
  return selection;
}

// The split fills the device, so that the tile is the widest one that is not mostly padding.
Selection select_hopper_wgrad(const Conv2dProblem& p, const Target& target) {
  static const char* const names[] = {"hopper_wgrad_128x256", "hopper_wgrad_128x128", "hopper_wgrad_128x64"};
  const auto blocks_of = [&](const Tile& tile) {
    return (p.k_per_group() + tile.rows - 1) / tile.rows *
           ((hopper_wgrad_panels(p) * 64 + tile.columns - 1) / tile.columns) * p.groups;
  };
  Target one_block = target;
  one_block.sm_count = 1;
  Selection selection;
  selection.family = Family::hopper;
  selection.config = choose_hopper_tile(one_block, blocks_of);
  selection.kernel = names[selection.config];
  selection.reason = kHopperReason;
  const Tile tile = kHopperTiles[selection.config];
  split(&selection, p, target,
        {blocks_of(tile), tile.rows * tile.columns / kProductsPerByteWgmma, p.filter_numel() * 4, kMinPositionsPerSlice,
         kResidentHopper});
  return selection;
}

Selection select_implicit_gemm(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[2][5] = {
      {"implicit_gemm_fprop_128x128", "implicit_gemm_fprop_128x64", "implicit_gemm_fprop_64x64",
       "implicit_gemm_fprop_128x32", "implicit_gemm_fprop_64x64_elements"},
      {"implicit_gemm_dgrad_128x128", "implicit_gemm_dgrad_128x64", "implicit_gemm_dgrad_64x64",
       "implicit_gemm_dgrad_128x32", "implicit_gemm_dgrad_64x64_elements"}};
  const Gather g = make_gather(op, p);
  const bool whole_chunks = g.in_c * size_of(dtype) % 16 == 0;
  Selection selection;
  selection.family = Family::implicit_gemm;
  selection.config = whole_chunks ? choose_gemm_tile(g, target) : kImplicitGemmElements;
  selection.kernel = names[op == Operator::dgrad][selection.config];
  selection.reason = !whole_chunks       ? "input channels that are not whole 16-byte chunks"
                     : g.is_pointwise() ? "1x1, stride 1: a plain matrix product"
                                        : "tensor cores, 16-byte chunks of input channels";
  if (op == Operator::dgrad) selection.workspace_bytes = static_cast<size_t>(p.filter_numel() * size_of(dtype));
  return selection;
}

// The split over positions fills the device, so that a tile is judged by its padding and its rate alone.
Selection select_wgrad_gemm(const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[] = {"implicit_gemm_wgrad_128x128", "implicit_gemm_wgrad_64x128",
                                      "implicit_gemm_wgrad_64x64"};
  constexpr double kShare[] = {1.0, 0.85, 0.7};
  const bool whole_chunks =
      p.c_per_group() * size_of(dtype) % 16 == 0 && p.k_per_group() * size_of(dtype) % 16 == 0;
  Selection selection;
  selection.family = Family::implicit_gemm;
  selection.config = kWgradGemmSmallest;
  double best_time = 0;
  for (int config = 0; whole_chunks && config <= kWgradGemmSmallest; ++config) {
    const Tile tile = kWgradGemmTiles[config];
    const double time = static_cast<double>(wgrad_blocks(p, tile)) * tile.rows * tile.columns / kShare[config];
    if (config == 0 || time < best_time) selection.config = config, best_time = time;
  }
  selection.kernel = names[selection.config];
  selection.reason =
      whole_chunks ? "tensor cores, 16-byte chunks of channels" : "channels that are not whole 16-byte chunks";
  const Tile tile = kWgradGemmTiles[selection.config];
  const double products_per_byte = dtype == DType::f32 ? kProductsPerByteTf32 : kProductsPerByte16;
  split(&selection, p, target,
        {wgrad_blocks(p, tile), tile.rows * tile.columns / products_per_byte,
         p.filter_numel() * accumulator_bytes(dtype), kMinPositionsPerSlice, kResidentGemm});
  return selection;
}

bool implicit_gemm_takes(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (target.sm < 80 || !has_tensor_core_type(dtype, target)) return false;
  if (p.groups > 1 && (p.c_per_group() < kMinGroupChannels || p.k_per_group() < kMinGroupChannels)) return false;
  if (op == Operator::wgrad) return wgrad_blocks(p, kWgradGemmTiles[2]) <= kMaxGridX;
  const Gather g = make_gather(op, p);
  return gather_blocks(g, kImplicitGemmTiles[kImplicitGemmElements]) <= kMaxGridX && g.phases_h <= kMaxGridYZ &&
         g.phases_w <= kMaxGridYZ;
}

Selection select_depthwise(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[3][2] = {{"depthwise_fprop_generic", "depthwise_fprop_tiled"},
                                          {"depthwise_dgrad_generic", "depthwise_dgrad_tiled"},
                                          {"depthwise_wgrad_generic", "depthwise_wgrad_tiled"}};
  Selection selection;
  selection.family = Family::depthwise;
  // Tiles are filled by cp.async, which sm_80 brought.
  selection.config = target.sm >= 80 && depthwise_is_tiled(p, dtype) ? kDepthwiseTiled : 0;
  selection.kernel = names[static_cast<int>(op)][selection.config];
  selection.reason = selection.config == kDepthwiseTiled
                         ? "one channel a group; 3x3, 5x5 or 7x7, stride 1 or 2"
                         : "one channel a group; no tiled kernel for this filter, stride, dilation, multiplier, "
                           "channel count or dtype";
  if (op == Operator::wgrad) {
    // 64 bytes of channels a block, or 32 channels of one tap; both read as much of x as of dy.
    const bool tiled = selection.config == kDepthwiseTiled;
    const int64_t blocks = tiled ? (p.c * size_of(dtype) + 63) / 64 : (p.k + 31) / 32 * p.r * p.s;
    const int64_t slice_bytes = p.filter_numel() * accumulator_bytes(dtype);
    split(&selection, p, target,
          {blocks, tiled ? 128.0 : 64.0 * size_of(dtype), slice_bytes,
           std::max(kMinPositionsPerSlice, kMinDepthwisePositionsPerTap * p.r * p.s), kResidentOthers});
    selection.workspace_bytes = static_cast<size_t>(selection.split_k * slice_bytes);
  }
  return selection;
}

bool is_depthwise(Operator op, const Conv2dProblem& p) {
  if (p.groups == 1 || p.c_per_group() != 1) return false;
  const Gather g = make_gather(op, p);  // the largest grid that either kernel of the family makes
  return g.max_rows() * ((p.k + 7) / 8) <= kMaxGridX && g.phases_h <= kMaxGridYZ && g.phases_w <= kMaxGridYZ;
}

}  // namespace

Selection select(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (!fits_int32(p)) return unsupported("sizes, positions or filter elements beyond 2^30");
  if (is_depthwise(op, p)) return select_depthwise(op, p, dtype, target);
  if (hopper_is_chosen(op, p, dtype, target)) {
    return op == Operator::wgrad ? select_hopper_wgrad(p, target) : select_hopper_gemm(op, p, dtype, target);
  }
  if (implicit_gemm_takes(op, p, dtype, target)) {
    return op == Operator::wgrad ? select_wgrad_gemm(p, dtype, target) : select_implicit_gemm(op, p, dtype, target);
  }
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
