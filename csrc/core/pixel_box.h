// A gather as the tensor memory accelerator's im2col walk: which pixels one copy brings, and for which tap.
//
// A map of an NHWC tensor holds a box of pixels: along an axis from `lower` to size - 1 + upper, by steps of the traversal
// stride. A copy walks the box, w fastest, then h, then images, and reads each pixel `offset` further on, zeros where that
// is outside of the tensor. With positions of an axis as core/gather.h has them,
//
//   input position = in_first + i * in_stride + t * in_step = (lower + i * in_stride) + offset(t)
//
// so output i is pixel i of the box, and a tap is an offset, which must not be negative. Phases of a dgrad differ in
// in_first, which goes into the offset, and by at most one in their number of outputs: at most two boxes per axis serve
// them all, whatever the stride.
#pragma once

#include <cstdint>

#include "core/gather.h"

namespace freezekit {

// What a map can hold (CUDA driver API, cuTensorMapEncodeIm2col, rank 4; offsets: PTX ISA, "im2col Offsets"). An offset of
// 255 fits too, but CUTLASS stops at 254, so nobody is known to have run it.
constexpr int32_t kMinCorner = -128, kMaxCorner = 127, kMaxTapOffset = 254, kMaxTraversalStride = 8;

struct PixelBox {
  int32_t lower = 0;
  int32_t upper[2] = {0, 0};  // of phases that have one output more than the others, and of those
  int32_t stride = 1;
  int32_t max_offset = 0;

  // How much further than its pixel tap `t` of a phase reads.
  FK_HOST_DEVICE int32_t offset(const GatherAxis& axis, int32_t t) const {
    return axis.in_first + t * axis.in_step - lower;
  }
  // The pixel of output i.
  FK_HOST_DEVICE int32_t pixel(int32_t i) const { return lower + i * stride; }
};

// Host only: a phase's first and last reads for output 0 decide. Outputs of a phase are `phase_step` apart; `axis` gives
// the gather of a phase.
template <class AxisOf>
PixelBox make_pixel_box(int32_t phases, int32_t phase_step, int32_t in_size, int32_t out_size, const AxisOf& axis) {
  PixelBox box;
  bool any = false;
  int32_t highest = 0;
  for (int32_t phase = 0; phase < phases; ++phase) {
    const GatherAxis gather = axis(phase);
    if (gather.taps == 0) continue;
    const int32_t last = gather.in_first + (gather.taps - 1) * gather.in_step;
    const int32_t low = gather.in_first < last ? gather.in_first : last;
    const int32_t high = gather.in_first < last ? last : gather.in_first;
    box.lower = !any || low < box.lower ? low : box.lower;
    highest = !any || high > highest ? high : highest;
    box.stride = gather.in_stride;
    any = true;
  }
  box.max_offset = highest - box.lower;
  const int32_t fewest = out_size / phase_step;
  for (int32_t fewer = 0; fewer < 2; ++fewer) {
    const int32_t count = fewer ? fewest : fewest + 1;
    box.upper[fewer] = box.lower + (count > 0 ? count - 1 : 0) * box.stride - (in_size - 1);
  }
  return box;
}

struct PixelBoxes {
  PixelBox h, w;
};

inline PixelBoxes make_pixel_boxes(const Gather& g) {
  return {make_pixel_box(g.phases_h, g.transposed ? g.h.stride : 1, g.in_h, g.out_h,
                         [&](int32_t phase) { return g.axis_h(phase); }),
          make_pixel_box(g.phases_w, g.transposed ? g.w.stride : 1, g.in_w, g.out_w,
                         [&](int32_t phase) { return g.axis_w(phase); })};
}

// Which of the two boxes of an axis a phase walks, as Gather::divide_h and divide_w are told apart.
FK_HOST_DEVICE int32_t box_of_phase(int32_t phase, int32_t wider) { return phase < wider ? 0 : 1; }

inline bool fits_map(const PixelBox& box) {
  const auto is_corner = [](int32_t corner) { return corner >= kMinCorner && corner <= kMaxCorner; };
  return is_corner(box.lower) && is_corner(box.upper[0]) && is_corner(box.upper[1]) &&
         box.max_offset <= kMaxTapOffset && box.stride <= kMaxTraversalStride;
}

}  // namespace freezekit
