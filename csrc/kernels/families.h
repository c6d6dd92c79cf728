// The launchers behind launch_conv2d, one per family and operator, and the steps that they share.
// They take problems that fits_int32 holds for and outputs that are not empty. A wgrad of several slices leaves their sums
// in the workspace, as split_k * filter_numel() accumulators; launch_conv2d adds them.
#pragma once

#include "core/pixel_box.h"
#include "kernels/api.h"

namespace freezekit {

// Output tile of a config: rows x columns of the GEMM that one block makes.
struct Tile {
  int rows, columns;
};

// The direct family's configs: wide for groups of many channels, narrow for few.
constexpr Tile kDirectGatherTiles[] = {{64, 64}, {128, 8}};
constexpr Tile kDirectWgradTiles[] = {{64, 64}, {16, 64}};

// The implicit GEMM's configs. The last one takes channel counts and addresses that the others cannot.
constexpr Tile kImplicitGemmTiles[] = {{128, 128}, {128, 64}, {64, 64}, {128, 32}, {64, 64}};
constexpr int kImplicitGemmElements = 4;

// The tensor-core wgrad's, for operands in whole chunks; others use the last.
constexpr Tile kWgradGemmTiles[] = {{128, 128}, {64, 128}, {64, 64}};
constexpr int kWgradGemmSmallest = 2;

// The Hopper family's: two warpgroups of 64 rows each.
constexpr int kHopperRows = 128;
constexpr Tile kHopperTiles[] = {{kHopperRows, 256}, {kHopperRows, 128}, {kHopperRows, 64}};

// What loops go by beside tiles: see rehearsals.h. A step of a reduction is so many channels, or positions where that is what
// is added up.
constexpr int kDirectStep = 8;
constexpr int kGemmStepBytes = 64, kGemmStages = 4;
constexpr int kHopperStepBytes = 128, kHopperWgradStep = 64, kMostHopperStages = 8;
constexpr int kDepthwiseWarps = 8;                           // of the generic wgrad: a position each
constexpr int kDepthwiseTile = 16, kDepthwiseChannels = 32;  // at most

constexpr int64_t kChannelsAtOnce = 32;  // of what is made of vectors and filters beside a convolution

// Blocks of a gather's grid along x, in its largest phase.
inline int64_t gather_blocks(const Gather& g, const Tile& tile) {
  return (g.max_rows() + tile.rows - 1) / tile.rows * ((g.out_c + tile.columns - 1) / tile.columns) * g.groups;
}

inline int64_t wgrad_blocks(const Conv2dProblem& p, const Tile& tile) {
  return (p.k_per_group() + tile.rows - 1) / tile.rows *
         ((p.c_per_group() * p.r * p.s + tile.columns - 1) / tile.columns) * p.groups;
}

constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridYZ = 65535;

// A call of launch_conv2d.
struct Conv2dLaunch {
  Operator op;
  Selection selection;
  const Conv2dProblem& problem;
  DType dtype;
  const Conv2dTensors& tensors;
  const Epilogue& epilogue;
  void* workspace;
  Stream stream;

  // What fprop and dgrad gather, and what they make.
  const void* in() const { return op == Operator::fprop ? tensors.x : tensors.y; }
  void* out() const { return op == Operator::fprop ? tensors.y : tensors.x; }
};

Status launch_direct_gather(const Conv2dLaunch&);
Status launch_direct_wgrad(const Conv2dLaunch&);

// The filter as the GEMM of fprop or dgrad reads it: as it is, or W' made in the workspace of filter_numel() elements.
Status prepare_filter(const Conv2dLaunch&, const void** filter);

// fprop and dgrad, then those of one type, of a filter that is KRSC for fprop and CRSK for dgrad; tf32 takes float.
Status launch_implicit_gemm(const Conv2dLaunch&);
template <class T>
Status launch_implicit_gemm_of(const Conv2dLaunch&, const void* filter);

// Of tensor cores. Several slices need a workspace that is 16-byte aligned.
Status launch_wgrad_gemm(const Conv2dLaunch&);

// The same for sm_90a, of what hopper_takes; at addresses that tensor maps cannot name the kernels of sm_80 run. wgrad is
// that of bf16 and f16.
Status launch_hopper_gemm(const Conv2dLaunch&);
template <class T>
Status launch_hopper_gemm_of(const Conv2dLaunch&, const void* filter);
Status launch_hopper_wgrad(const Conv2dLaunch&);
Status launch_hopper_wgrad_kernel(const Conv2dLaunch&);

// Panels of 64 channels of one tap, of a group.
inline int64_t hopper_wgrad_panels(const Conv2dProblem& p) { return (p.c_per_group() + 63) / 64 * p.r * p.s; }

// Whether tensor maps can name the problem's tensors.
inline bool hopper_takes(Operator op, const Conv2dProblem& p, DType dtype) {
  const bool wgrad = op == Operator::wgrad;
  if (dtype == DType::f64 || (wgrad && dtype == DType::f32)) return false;
  const Gather g = make_gather(wgrad ? Operator::fprop : op, p);
  const int64_t size = size_of(dtype), in_bytes = size * g.in_c * g.groups, out_bytes = size * g.out_c * g.groups;
  if (in_bytes % 16 != 0 || (wgrad && out_bytes % 16 != 0)) return false;
  // With several groups a k-tile of fprop or dgrad must not reach into the next one, whose values, if not finite, zeros of
  // the filter would not blot out; a filter's rows must be whole chunks too.
  if (!wgrad && g.in_c * size % (g.groups > 1 ? 128 : 16) != 0) return false;
  if (in_bytes * g.in_h * g.in_w >= int64_t{1} << 40) return false;
  if (g.phases_h > kMaxTraversalStride || g.phases_w > kMaxTraversalStride) return false;
  if (!wgrad && g.is_pointwise()) return true;
  const PixelBoxes boxes = make_pixel_boxes(g);
  return fits_map(boxes.h) && fits_map(boxes.w);
}

// Depthwise, one input channel per group. Config 0 is generic; 1 is tiled, where depthwise_is_tiled.
// A wgrad always leaves sums of slices, if of one.
constexpr int kDepthwiseTiled = 1;
Status launch_depthwise_gather(const Conv2dLaunch&);
Status launch_depthwise_wgrad(const Conv2dLaunch&);
Status launch_depthwise_generic_gather(const Conv2dLaunch&);
Status launch_depthwise_generic_wgrad(const Conv2dLaunch&);

// Whether the tiled depthwise kernels are made for the problem's sizes; addresses are looked at when they are launched.
inline bool depthwise_is_tiled(const Conv2dProblem& p, DType dtype) {
  return dtype != DType::f64 && p.c_per_group() == 1 && p.k_per_group() == 1 && p.c % 8 == 0 && p.r == p.s &&
         (p.r == 3 || p.r == 5 || p.r == 7) && p.stride_h == p.stride_w && (p.stride_h == 1 || p.stride_h == 2) &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

// out[i] = sum of partial[s * numel + i] over s, in the order of s. The partial sums are in the accumulator of dtype.
Status launch_ordered_reduce(const void* partial, void* out, int64_t numel, int32_t slices, DType dtype, Stream);

// Zeroes what a kernel that or-s or stores bytes does not: all words, or only the last where runs own whole
// bytes. Nothing where there is no mask.
Status launch_mask_prepare(uint32_t* mask, int64_t numel, bool runs_own_bytes, Stream);

}  // namespace freezekit
