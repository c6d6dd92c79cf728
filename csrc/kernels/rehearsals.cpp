#include "kernels/rehearsals.h"

#include <algorithm>

#include "kernels/select.h"

namespace freezekit {
namespace {

// Elements of both activations from which on the first problem leaves the second channel tile to the other one: large
// strides have many phases.
constexpr int64_t kMostElements = 1 << 21;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// What a kernel's loops go by.
struct Loops {
  Tile tile = {1, 1};    // positions x output channels; of a wgrad output channels x filter elements
  int64_t step = 1;      // of the reduction: channels, of a wgrad positions
  int64_t stages = 1;    // steps that are under way at once
  int64_t at_once = 0;   // blocks that walk several tiles each; 0: each has one
  int64_t run = 1;       // channels of a filter element that a wgrad's block takes together
  int64_t of_group = 1;  // what a group's input channels are multiples of
};

Loops loops_of(Operator op, DType dtype, const Selection& by, int64_t groups, const Target& target) {
  const bool wgrad = op == Operator::wgrad;
  const int64_t size = size_of(dtype);
  Loops loops;
  switch (by.family) {
    case Family::direct:
      loops.tile = wgrad ? kDirectWgradTiles[by.config] : kDirectGatherTiles[by.config];
      loops.step = kDirectStep;
      break;
    case Family::implicit_gemm:
      loops.tile = wgrad ? kWgradGemmTiles[by.config] : kImplicitGemmTiles[by.config];
      loops.step = kGemmStepBytes / size, loops.stages = kGemmStages;
      break;
    case Family::hopper:
      loops.tile = kHopperTiles[by.config];
      loops.step = wgrad ? kHopperWgradStep : kHopperStepBytes / size, loops.stages = kMostHopperStages;
      loops.at_once = target.sm_count;
      loops.run = kHopperWgradStep;
      if (!wgrad) loops.of_group = groups > 1 ? kHopperStepBytes / size : 16 / size;
      break;
    case Family::depthwise:
      loops.step = kDepthwiseWarps;
      break;
    case Family::none:
      break;
  }
  return loops;
}

// An axis of at least `out` outputs, an odd number, of which one meets no padding; `leaves`: inputs are left over behind
// the last window, and whether the stride divides their number is not as without.
void set_axis(int64_t& in, int64_t& out, int64_t least, int64_t taps, int64_t pad, int64_t stride, int64_t dilation,
              bool leaves) {
  out = std::max(least, 2 * pad / stride + 2) | 1;
  in = (out - 1) * stride + dilation * (taps - 1) + 1 - 2 * pad;
  if (leaves) in += in % stride == 0 ? stride - 1 : stride - in % stride;
}

struct Leaves {
  bool h, w;
};

void set_positions(Operator op, Conv2dProblem& p, int64_t rows, int64_t columns, const Leaves& leaves) {
  const bool one_h = is_one_phase(op, p.h, p.stride_h), one_w = is_one_phase(op, p.w, p.stride_w);
  if (!one_h) set_axis(p.h, p.p, rows, p.r, p.pad_h, p.stride_h, p.dilation_h, leaves.h);
  if (!one_w) set_axis(p.w, p.q, columns, p.s, p.pad_w, p.stride_w, p.dilation_w, leaves.w);
}

void set_depthwise_channels(Conv2dProblem& p, const Conv2dProblem& like, bool is_tiled, bool first) {
  const int64_t unit = channel_unit(like.c), of_k = channel_unit(like.k);
  p.c = p.groups = kDepthwiseChannels + unit;
  p.k = p.c * std::max<int64_t>(of_k / unit, 1) * (first || is_tiled ? 1 : 3);
}

void set_channels(Operator op, Conv2dProblem& p, const Conv2dProblem& like, const Loops& loops, bool first,
                  bool is_wide) {
  const int64_t unit_c = channel_unit(like.c_per_group()), unit_k = channel_unit(like.k_per_group());
  const int64_t taps = p.r * p.s;
  int64_t c = 0, k = 0;
  if (op == Operator::wgrad) {
    const int64_t columns = loops.tile.columns * (loops.at_once / 2 + 1);
    c = first ? round_up(std::max(columns / taps, loops.run), 8) + unit_c : unit_c;
    k = first ? loops.tile.rows + unit_k : unit_k;
  } else {
    const bool fprop = op == Operator::fprop;
    const int64_t unit = fprop ? unit_c : unit_k, steps = (loops.stages + 1) * loops.step;
    const int64_t reduced = first ? 0 : round_up(std::max({loops.step, steps / taps, kChannelsAtOnce}), 8);
    (fprop ? c : k) = round_up(reduced + unit, std::max(unit, loops.of_group));
    (fprop ? k : c) = (is_wide ? loops.tile.columns : 0) + (fprop ? unit_k : unit_c);
  }
  p.groups = like.groups > 1 ? 3 : 1;
  // Tensor maps need whole 16 bytes of all groups' channels together.
  if (like.groups > 1 && loops.at_once > 0) p.groups = std::max<int64_t>(3, 8 / std::min(unit_c, unit_k));
  p.c = c * p.groups, p.k = k * p.groups;
}

Rehearsed made(Operator op, const Conv2dProblem& like, DType dtype, const Selection& by, const Target& target,
               bool first, const Leaves& leaves) {
  Rehearsed made = {like, by};
  Conv2dProblem& p = made.problem;
  int& slices = made.selection.split_k;
  if (slices_of(by) == Slices::several) slices = first ? 6 : 2;
  if (slices_of(by) == Slices::many) slices = first ? kManySlices + 1 : kManySlices + 7;  // lanes share neither evenly
  p.n = first ? 3 : 2;
  const bool wgrad = op == Operator::wgrad;
  const Loops loops = loops_of(op, dtype, by, like.groups, target);
  // Of a wgrad, in all slices: so few that some are empty, or that the last lacks some.
  const int64_t steps = first ? slices + 1 : slices * (loops.stages + 3);
  constexpr int64_t kLeast = 5;
  if (by.family == Family::depthwise && by.config == kDepthwiseTiled) {
    const int64_t least = first ? kDepthwiseTile + 3 : kLeast;  // of either axis: four tiles at least, or one
    set_positions(op, p, least, least, leaves);
    if (wgrad && slices > 1) p.n = first ? (steps + 3) / 4 : steps - 1;
  } else {
    set_positions(op, p, kLeast, kLeast, leaves);
    // Each phase of a dgrad has tiles of its own.
    const int64_t phases = op == Operator::dgrad ? std::min(p.stride_h, p.h) * std::min(p.stride_w, p.w) : 1;
    const int64_t of_row = p.n * p.p, rows = loops.tile.rows * (loops.at_once / (2 * phases) + 1);
    const int64_t least = !first  ? wgrad ? (steps * loops.step / of_row - 1) | 1 : 1
                          : wgrad ? (steps - 1) * loops.step / of_row + 1
                                  : rows / of_row + 1;
    set_positions(op, p, kLeast, std::max(kLeast, least), leaves);
    if (first && p.h * p.w == 1) p.n = rows + 1;
  }
  if (by.family == Family::depthwise) {
    set_depthwise_channels(p, like, by.config == kDepthwiseTiled, first);
  } else {
    set_channels(op, p, like, loops, first, /*is_wide=*/true);
    const bool is_large = p.x_numel() + p.y_numel() > kMostElements;
    if (first && is_large && loops.at_once == 0) set_channels(op, p, like, loops, first, /*is_wide=*/false);
  }
  made.selection.workspace_bytes = workspace_bytes(op, made.selection, p, dtype);
  return made;
}

}  // namespace

std::vector<Rehearsed> rehearsals(Operator op, const Conv2dProblem& like, DType dtype, const Selection& by,
                                  const Target& target) {
  std::vector<Rehearsed> all = {made(op, like, dtype, by, target, /*first=*/true, {false, true}),
                                made(op, like, dtype, by, target, /*first=*/false, {true, false})};
  if (op != Operator::dgrad || by.family != Family::hopper || like.stride_h * like.stride_w == 1) return all;
  const Conv2dProblem &rows = all[0].problem, &columns = all[1].problem;  // without what is left over
  const Leaves differ = {rows.h % rows.stride_h == 0, columns.w % columns.stride_w == 0};
  all.push_back(made(op, like, dtype, by, target, /*first=*/false, differ));
  return all;
}

}  // namespace freezekit
