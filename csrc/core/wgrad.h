// wgrad as a GEMM: which elements of dy and x meet in which element of dw.
//
//   dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * x[n, p * stride_h - pad_h + r * dilation_h, ..., c]
//
//   GEMM        | index            | tensor index
//   row m       | output channel   | k of a group
//   column j    | filter element   | r, s, c of a group
//   reduction l | output position  | n, p, q
//
// The reduction is cut into slices of whole positions, one block row of the grid each.
#pragma once

#include <cstdint>

#include "core/fast_divide.h"
#include "core/gather.h"
#include "core/host_device.h"
#include "core/problem.h"

namespace freezekit {

// What a column of the GEMM adds to the input position p * stride, q * stride.
struct WgradColumn {
  int32_t h = 0, w = 0, channel = 0;
};

// The input position of an output position at the corner of the padded window.
struct WgradPosition {
  int32_t image = 0;  // n * H * W
  int32_t h = 0, w = 0;
};

struct Wgrad {
  ConvAxis h, w;
  int32_t positions = 0;  // n * p * q
  int32_t positions_per_slice = 0;
  int32_t groups = 1, c = 0, k = 0;  // c, k: of one group
  FastDivide divide_q, divide_p, divide_c, divide_s;

  FK_HOST_DEVICE int32_t columns() const { return h.taps * w.taps * c; }
  FK_HOST_DEVICE int64_t c_all() const { return static_cast<int64_t>(c) * groups; }
  FK_HOST_DEVICE int64_t k_all() const { return static_cast<int64_t>(k) * groups; }
  FK_HOST_DEVICE int64_t dw_numel() const { return k_all() * columns(); }
  // Of element (m, 0) of a group's GEMM.
  FK_HOST_DEVICE int64_t dw_offset(int32_t group, int32_t m) const {
    return (static_cast<int64_t>(group) * k + m) * columns();
  }

  FK_HOST_DEVICE WgradColumn column(int32_t j) const {
    WgradColumn column;
    int32_t s;
    const int32_t r = divide_s.divide(divide_c.divide(j, &column.channel), &s);
    column.h = r * h.dilation - h.pad, column.w = s * w.dilation - w.pad;
    return column;
  }

  FK_HOST_DEVICE WgradPosition position(int32_t l) const {
    int32_t p, q;
    const int32_t line = divide_q.divide(l, &q), n = divide_p.divide(line, &p);
    return {n * h.x * w.x, p * h.stride, q * w.stride};
  }

  // Where in x (as a position n, h, w) an output position meets a column; false: in the padding.
  FK_HOST_DEVICE bool meet(const WgradPosition& position, const WgradColumn& column, int32_t* in_x) const {
    const int32_t ih = position.h + column.h, iw = position.w + column.w;
    *in_x = position.image + ih * w.x + iw;
    return ih >= 0 && ih < h.x && iw >= 0 && iw < w.x;
  }
};

// Host only; the problem has passed fits_int32. Slices begin at multiples of `step` positions.
inline Wgrad make_wgrad(const Conv2dProblem& p, int32_t split_k, int32_t step) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const ConvAxisPair axes = make_axes(p);
  Wgrad wgrad;
  wgrad.h = axes.h, wgrad.w = axes.w;
  wgrad.positions = narrow(p.n * p.p * p.q);
  const int64_t steps = (wgrad.positions + step - 1) / step;
  wgrad.positions_per_slice = narrow((steps + split_k - 1) / split_k * step);
  wgrad.groups = narrow(p.groups), wgrad.c = narrow(p.c_per_group()), wgrad.k = narrow(p.k_per_group());
  wgrad.divide_q = FastDivide(axes.w.y), wgrad.divide_p = FastDivide(axes.h.y);
  wgrad.divide_c = FastDivide(wgrad.c), wgrad.divide_s = FastDivide(axes.w.taps);
  return wgrad;
}

}  // namespace freezekit
