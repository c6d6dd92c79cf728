// fprop and dgrad as one operation: every output position gathers input positions through the taps of the filter.
//
// Along one axis, output i and tap t meet at
//   output position = out_first + i * out_step
//   input position  = in_first + i * in_stride + t * in_step       (nothing is read where it is outside the input)
//   filter index    = filter_first + t * filter_step
//
// fprop is one such gather: h = p * stride - pad + r * dilation.
//
// dgrad, dx[h] = sum over r, p with p * stride = h + pad - r * dilation, splits into `stride` phases: the outputs
// h = a + stride * i of phase a all use the same taps, those r with r * dilation = a + pad (mod stride). With
// g = gcd(stride, dilation) there are none unless g divides a + pad; else they are r0, r0 + stride / g, ..., and
//   p = i + (a + pad - r0 * dilation) / stride - t * dilation / g.
// So each phase is a unit-stride gather of its own taps, without a multiplication by a zero that striding puts in.
// The rotation of the filter by 180 degrees is the minus sign of the last term.
#pragma once

#include <cstdint>

#include "core/fast_divide.h"
#include "core/host_device.h"
#include "core/problem.h"

namespace freezekit {

struct GatherAxis {
  int32_t count = 0;  // output positions
  int32_t taps = 0;
  int32_t out_first = 0, out_step = 1;
  int32_t in_first = 0, in_stride = 1, in_step = 1;
  int32_t filter_first = 0, filter_step = 1;
};

// One axis of the convolution y = x * f, in the problem's own terms.
struct ConvAxis {
  int32_t x = 0, y = 0, taps = 0;  // sizes of x, of y and of the filter
  int32_t pad = 0, stride = 1, dilation = 1;
};

struct ConvAxisPair {
  ConvAxis h, w;
};

// The problem has passed fits_int32.
inline ConvAxisPair make_axes(const Conv2dProblem& p) {
  const auto axis = [](int64_t x, int64_t y, int64_t taps, int64_t pad, int64_t stride, int64_t dilation) {
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    return ConvAxis{narrow(x), narrow(y), narrow(taps), narrow(pad), narrow(stride), narrow(dilation)};
  };
  return {axis(p.h, p.p, p.r, p.pad_h, p.stride_h, p.dilation_h),
          axis(p.w, p.q, p.s, p.pad_w, p.stride_w, p.dilation_w)};
}

FK_HOST_DEVICE int32_t greatest_common_divisor(int32_t a, int32_t b) {
  while (b != 0) {
    const int32_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Phases that have outputs: a stride beyond the size of x leaves the rest empty.
FK_HOST_DEVICE int32_t dgrad_phases(const ConvAxis& axis) { return axis.stride < axis.x ? axis.stride : axis.x; }

FK_HOST_DEVICE GatherAxis fprop_axis(const ConvAxis& axis) {
  GatherAxis gather;
  gather.count = axis.y;
  gather.taps = axis.taps;
  gather.in_first = -axis.pad;
  gather.in_stride = axis.stride;
  gather.in_step = axis.dilation;
  return gather;
}

FK_HOST_DEVICE GatherAxis dgrad_axis(const ConvAxis& axis, int32_t phase) {
  GatherAxis gather;
  gather.count = (axis.x - phase + axis.stride - 1) / axis.stride;
  gather.out_first = phase;
  gather.out_step = axis.stride;
  const int32_t divisor = greatest_common_divisor(axis.stride, axis.dilation);
  const int32_t step = axis.stride / divisor;  // between the taps of one phase
  int32_t first = 0;
  const int32_t candidates = step < axis.taps ? step : axis.taps;
  while (first < candidates && (phase + axis.pad - first * axis.dilation) % axis.stride != 0) ++first;
  if (first == candidates) return gather;  // no taps: dx is the epilogue of zero here
  gather.taps = (axis.taps - first + step - 1) / step;
  gather.in_first = (phase + axis.pad - first * axis.dilation) / axis.stride;
  gather.in_step = -(axis.dilation / divisor);
  gather.filter_first = first;
  gather.filter_step = step;
  return gather;
}

// Where a walk through the reduction of a gather stands: over channels first, then taps along w, then along h.
struct GatherCursor {
  int32_t tap_h = 0, tap_w = 0, channel = 0;

  // Needs taps_w >= 1. Past the end tap_h is at least the number of taps along h.
  FK_HOST_DEVICE void advance(int32_t by, int32_t channels, int32_t taps_w) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++tap_w == taps_w) tap_w = 0, ++tap_h;
    }
  }
};

// The input positions of one output row at tap (0, 0).
struct GatherOrigin {
  int32_t image = 0;                   // n * in_h * in_w
  int32_t ih = INT32_MIN / 2, iw = 0;  // by default outside, at every tap
};

// The whole gather, per group: out[n, oh, ow, :] of out_c channels reads in[n, ih, iw, :] of in_c channels.
// fprop gathers x into y, dgrad gathers dy into dx.
struct Gather {
  ConvAxis h, w;
  int32_t batch = 0, groups = 1;
  int32_t in_h = 0, in_w = 0, in_c = 0;  // in_c, out_c: of one group
  int32_t out_h = 0, out_w = 0, out_c = 0;
  int32_t phases_h = 1, phases_w = 1;
  int32_t transposed = 0;     // 1: dgrad
  GatherAxis only_h, only_w;  // where there is a single phase
  // By the number of rows and columns of a phase; phases below `wider` have one more than those from it on.
  FastDivide divide_h[2], divide_w[2];
  int32_t wider_h = 0, wider_w = 0;

  FK_HOST_DEVICE GatherAxis axis_h(int32_t phase) const { return phases_h == 1 ? only_h : dgrad_axis(h, phase); }
  FK_HOST_DEVICE GatherAxis axis_w(int32_t phase) const { return phases_w == 1 ? only_w : dgrad_axis(w, phase); }

  // Whether output rows are in memory in the order of m.
  FK_HOST_DEVICE bool rows_are_dense() const { return phases_h == 1 && phases_w == 1; }
  // Whether output row m reads input row m and nothing else: a matrix product.
  FK_HOST_DEVICE bool is_pointwise() const {
    return h.taps == 1 && w.taps == 1 && h.stride == 1 && w.stride == 1 && h.pad == 0 && w.pad == 0;
  }

  // Row m of the phase's output matrix (n, i, j), row-major.
  FK_HOST_DEVICE int32_t decode_row(int32_t m, int32_t phase_h, int32_t phase_w, int32_t* i, int32_t* j) const {
    const int32_t line = divide_w[phase_w < wider_w ? 0 : 1].divide(m, j);
    return divide_h[phase_h < wider_h ? 0 : 1].divide(line, i);
  }

  // Elements of one output channel's filter, taps and input channels of its group.
  FK_HOST_DEVICE int32_t filter_row() const { return h.taps * w.taps * in_c; }

  FK_HOST_DEVICE GatherOrigin origin(int32_t m, int32_t phase_h, int32_t phase_w, const GatherAxis& axis_h,
                                     const GatherAxis& axis_w) const {
    int32_t i, j;
    const int32_t n = decode_row(m, phase_h, phase_w, &i, &j);
    return {n * in_h * in_w, axis_h.in_first + i * axis_h.in_stride, axis_w.in_first + j * axis_w.in_stride};
  }

  FK_HOST_DEVICE int64_t in_offset(int32_t n, int32_t ih, int32_t iw) const {
    return ((static_cast<int64_t>(n) * in_h + ih) * in_w + iw) * (static_cast<int64_t>(in_c) * groups);
  }
  FK_HOST_DEVICE int64_t out_offset(int32_t n, int32_t oh, int32_t ow) const {
    return ((static_cast<int64_t>(n) * out_h + oh) * out_w + ow) * (static_cast<int64_t>(out_c) * groups);
  }

  int64_t out_numel() const { return out_offset(batch, 0, 0); }

  // Rows of the largest phase, (0, 0).
  int64_t max_rows() const { return static_cast<int64_t>(batch) * axis_h(0).count * axis_w(0).count; }
};

// Host only. `op` is fprop or dgrad; the problem has passed fits_int32.
inline Gather make_gather(Operator op, const Conv2dProblem& p) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  Gather g;
  const ConvAxisPair axes = make_axes(p);
  g.h = axes.h, g.w = axes.w;
  g.batch = narrow(p.n);
  g.groups = narrow(p.groups);
  g.transposed = op == Operator::dgrad;
  g.in_h = g.transposed ? g.h.y : g.h.x, g.in_w = g.transposed ? g.w.y : g.w.x;
  g.out_h = g.transposed ? g.h.x : g.h.y, g.out_w = g.transposed ? g.w.x : g.w.y;
  g.in_c = narrow(g.transposed ? p.k_per_group() : p.c_per_group());
  g.out_c = narrow(g.transposed ? p.c_per_group() : p.k_per_group());
  if (g.transposed) {
    g.phases_h = dgrad_phases(g.h), g.phases_w = dgrad_phases(g.w);
    g.wider_h = g.h.x % g.h.stride, g.wider_w = g.w.x % g.w.stride;
  }
  g.only_h = g.transposed ? dgrad_axis(g.h, 0) : fprop_axis(g.h);
  g.only_w = g.transposed ? dgrad_axis(g.w, 0) : fprop_axis(g.w);
  const int32_t stride_h = g.transposed ? g.h.stride : 1, stride_w = g.transposed ? g.w.stride : 1;
  g.divide_h[0] = FastDivide(g.out_h / stride_h + 1), g.divide_h[1] = FastDivide(g.out_h / stride_h);
  g.divide_w[0] = FastDivide(g.out_w / stride_w + 1), g.divide_w[1] = FastDivide(g.out_w / stride_w);
  return g;
}

// Whether every size, position and row number of the problem fits 32 bits with room to spare. Offsets are 64 bits wide.
inline bool fits_int32(const Conv2dProblem& p) {
  constexpr int64_t limit = int64_t{1} << 30;
  const auto reach = [](int64_t size, int64_t pad, int64_t taps, int64_t stride, int64_t dilation) {
    return size < limit && pad < limit && stride < limit && dilation < limit && taps < limit &&
           size + 2 * pad + dilation * taps + stride < limit;
  };
  return p.n < limit && p.c < limit && p.k < limit && reach(p.h, p.pad_h, p.r, p.stride_h, p.dilation_h) &&
         reach(p.w, p.pad_w, p.s, p.stride_w, p.dilation_w) && p.p < limit && p.q < limit && p.h * p.w < limit &&
         p.p * p.q < limit && p.n * p.h * p.w < limit && p.n * p.p * p.q < limit && p.r * p.s < limit &&
         p.c_per_group() * p.r * p.s < limit && p.k_per_group() * p.r * p.s < limit;
}

}  // namespace freezekit
