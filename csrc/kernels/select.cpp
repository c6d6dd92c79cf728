// Which kernel runs, and why. Pure host code: no device, no CUDA header.
#include "kernels/select.h"

#include <algorithm>

namespace freezekit {
namespace {

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
  selection.reason = selection.config == 0 ? "at least 32 output channels per group" : "few output channels per group";
  return selection;
}

// Channels of a group from which on a tensor-core tile is worth its padding.
constexpr int32_t kMinGroupChannels = 16;

bool has_tensor_core_type(DType dtype, const Target& target) {
  return dtype == DType::bf16 || dtype == DType::f16 || (dtype == DType::f32 && target.allow_tf32);
}

// Half a k-tile or panel: with fewer bytes of channels most of a product would be with zeros.
constexpr int64_t kMinHopperChannelBytes = 64;

bool hopper_is_chosen(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (!target.hopper || target.sm != 90 || !has_tensor_core_type(dtype, target)) return false;
  const int64_t channels = op == Operator::dgrad ? p.k_per_group() : p.c_per_group();
  if (!hopper_takes(op, p, dtype) || channels * size_of(dtype) < kMinHopperChannelBytes) return false;
  if (op == Operator::wgrad) return true;  // the launch bounds the grid
  const Gather g = make_gather(op, p);
  return gather_blocks(g, kHopperTiles[2]) * g.phases_h * g.phases_w <= kMaxGridX;
}

// fastest_tile for a gather's blocks, over the whole device.
template <int kTiles, int kConfigs>
int fastest_gather_tile(const Tile (&tiles)[kTiles], const double (&shares)[kConfigs], const Gather& g,
                        const Target& target) {
  const int64_t at_once = std::max(target.sm_count, 1);
  return fastest_tile(tiles, shares, [&](const Tile& tile) {
    return (gather_blocks(g, tile) * g.phases_h * g.phases_w + at_once - 1) / at_once;
  });
}

Selection select_hopper_gemm(Operator op, const Conv2dProblem& p, const Target& target) {
  static const char* const names[2][3] = {{"hopper_fprop_128x256", "hopper_fprop_128x128", "hopper_fprop_128x64"},
                                          {"hopper_dgrad_128x256", "hopper_dgrad_128x128", "hopper_dgrad_128x64"}};
  constexpr double kShares[] = {1.0, 0.9, 0.7};
  const Gather g = make_gather(op, p);
  Selection selection;
  selection.family = Family::hopper;
  selection.config = fastest_gather_tile(kHopperTiles, kShares, g, target);
  selection.kernel = names[op == Operator::dgrad][selection.config];
  selection.reason = kHopperReason;
  return selection;
}

Selection select_implicit_gemm(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  static const char* const names[2][5] = {
      {"implicit_gemm_fprop_128x128", "implicit_gemm_fprop_128x64", "implicit_gemm_fprop_64x64",
       "implicit_gemm_fprop_128x32", "implicit_gemm_fprop_64x64_elements"},
      {"implicit_gemm_dgrad_128x128", "implicit_gemm_dgrad_128x64", "implicit_gemm_dgrad_64x64",
       "implicit_gemm_dgrad_128x32", "implicit_gemm_dgrad_64x64_elements"}};
  constexpr double kShares[] = {1.0, 0.85, 0.7, 0.6};
  const Gather g = make_gather(op, p);
  const bool whole_chunks = g.in_c * size_of(dtype) % 16 == 0;
  Selection selection;
  selection.family = Family::implicit_gemm;
  selection.config = whole_chunks ? fastest_gather_tile(kImplicitGemmTiles, kShares, g, target) : kImplicitGemmElements;
  selection.kernel = names[op == Operator::dgrad][selection.config];
  selection.reason = !whole_chunks      ? "input channels that are not whole 16-byte chunks"
                     : g.is_pointwise() ? "1x1, stride 1: a plain matrix product"
                                        : "tensor cores, 16-byte chunks of input channels";
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
                         ? "one channel per group; 3x3, 5x5 or 7x7, stride 1 or 2"
                         : "one channel per group; no tiled kernel for this filter, stride, dilation, multiplier, "
                           "channel count or dtype";
  if (op == Operator::wgrad) split_depthwise_wgrad(&selection, p, dtype, target);
  return selection;
}

bool is_depthwise(Operator op, const Conv2dProblem& p) {
  if (p.groups == 1 || p.c_per_group() != 1) return false;
  const Gather g = make_gather(op, p);  // the largest grid that either kernel of the family makes
  return g.max_rows() * ((p.k + 7) / 8) <= kMaxGridX && g.phases_h <= kMaxGridYZ && g.phases_w <= kMaxGridYZ;
}

Selection select_kernel(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  if (!fits_int32(p)) return unsupported("sizes, positions or filter elements beyond 2^30");
  if (is_depthwise(op, p)) return select_depthwise(op, p, dtype, target);
  if (hopper_is_chosen(op, p, dtype, target)) {
    return op == Operator::wgrad ? select_hopper_wgrad(p, target) : select_hopper_gemm(op, p, target);
  }
  if (implicit_gemm_takes(op, p, dtype, target)) {
    return op == Operator::wgrad ? select_wgrad_gemm(p, dtype, target) : select_implicit_gemm(op, p, dtype, target);
  }
  return op == Operator::wgrad ? select_direct_wgrad(p, dtype, target) : select_direct_gather(op, p);
}

}  // namespace

Selection select(Operator op, const Conv2dProblem& p, DType dtype, const Target& target) {
  Selection selection = select_kernel(op, p, dtype, target);
  selection.workspace_bytes = workspace_bytes(op, selection, p, dtype);
  return selection;
}

size_t workspace_bytes(Operator op, const Selection& by, const Conv2dProblem& p, DType dtype) {
  const bool makes_filter = by.family == Family::implicit_gemm || by.family == Family::hopper;
  const bool has_slices = by.family != Family::none && (by.split_k > 1 || by.family == Family::depthwise);
  const int64_t sums = op == Operator::wgrad ? has_slices * by.split_k * accumulator_bytes(dtype) : 0;
  const int64_t filters = op == Operator::dgrad && makes_filter ? size_of(dtype) : 0;
  return static_cast<size_t>((sums + filters) * p.filter_numel());
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
