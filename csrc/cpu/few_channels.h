// dgrad of an input of few channels, such as an image's: dx in NHWC, of dy in NHWC.
//
//   dx[n, h, w, c] += sum over k of dy[n, p, q, k] * f[k, c, r, s]   (core/problem.h says which p, q, r, s meet h, w)
//
// Vectorised over channels, as libraries do it, three of eight lanes or more are idle. In NHWC the taps (s, c) of a row of
// the filter meet elements of a row of dx that follow each other, and those are the lanes here: 21 for 7 x 7 x 3. Sums over k
// stay in registers, for a few positions q at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "cpu/simd.h"

namespace freezekit::cpu {

using Lanes = Vector<8>::Type;

// Registers of 8 lanes that a part of a row of the filter takes.
constexpr int64_t kMostLanes = 3;

// A row of the filter, (s, c), in parts of at most 24 elements; each of K vectors, filled up with zeros.
//
//   rows[((r * parts + part) * K + k) * 8 * lanes + i]
class FilterRows {
 public:
  // The filter is dense KRSC.
  FilterRows(const Conv2dProblem& p, const float* filter)
      : length_(p.s * p.c), parts_((length_ + 8 * kMostLanes - 1) / (8 * kMostLanes)),
        part_((length_ + parts_ - 1) / parts_), lanes_((part_ + 7) / 8), k_(p.k),
        rows_(p.r * parts_ * p.k * 8 * lanes_) {
    for (int64_t r = 0; r < p.r; ++r) {
      for (int64_t i = 0; i < parts_; ++i) {
        float* const to = rows_.data() + (r * parts_ + i) * k_ * 8 * lanes_;
        for (int64_t k = 0; k < k_; ++k) {
          const float* const from = filter + (k * p.r + r) * length_ + first(i);
          std::copy(from, from + count(i), to + k * 8 * lanes_);
        }
      }
    }
  }

  int64_t parts() const { return parts_; }
  int64_t lanes() const { return lanes_; }
  int64_t first(int64_t part) const { return part * part_; }
  int64_t count(int64_t part) const { return std::min(part_, length_ - first(part)); }
  const float* row(int64_t r, int64_t part) const { return rows_.data() + (r * parts_ + part) * k_ * 8 * lanes_; }

 private:
  int64_t length_, parts_, part_, lanes_, k_;
  std::vector<float> rows_;
};

// to[i * step + j] += sum over k of dy[i, k] * f[k, j], for first <= i * step + j < last: j ... of `count`, i of kPixels.
template <int kPixels, int kLanes>
FK_INLINE void add_row(const float* dy, const float* f, int64_t channels, float* to, int64_t step, int64_t count,
                       int64_t first, int64_t last) {
  Lanes acc[kPixels][kLanes] = {};
  for (int64_t k = 0; k < channels; ++k) {
    Lanes of_f[kLanes];
    for (int j = 0; j < kLanes; ++j) of_f[j] = load<8>(f + (k * kLanes + j) * 8);
    for (int i = 0; i < kPixels; ++i) {
      const Lanes of_dy = Lanes{} + dy[i * channels + k];
      for (int j = 0; j < kLanes; ++j) acc[i][j] += of_f[j] * of_dy;
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    float sums[8 * kLanes];
    for (int j = 0; j < kLanes; ++j) store(sums + 8 * j, acc[i][j]);
    const int64_t end = std::min(count, last - i * step);
    for (int64_t j = std::max<int64_t>(0, first - i * step); j < end; ++j) to[i * step + j] += sums[j];
  }
}

// What row p of an image's dy adds through one row of the filter, of which `f` is a part, to a row of dx.
template <int kLanes>
FK_INLINE void add_rows(const Conv2dProblem& p, const float* dy, const float* f, int64_t first, int64_t count,
                        float* dx) {
  constexpr int kPixels = 12 / kLanes;  // 12 sums, and what they are made of, fill the registers
  const int64_t step = p.stride_w * p.c, width = p.w * p.c;
  int64_t q = 0, at = first - p.pad_w * p.c;  // where the part is that q meets, in the row of dx
  for (; q + kPixels <= p.q; q += kPixels, at += kPixels * step) {
    add_row<kPixels, kLanes>(dy + q * p.k, f, p.k, dx + at, step, count, -at, width - at);
  }
  for (; q < p.q; ++q, at += step) add_row<1, kLanes>(dy + q * p.k, f, p.k, dx + at, step, count, -at, width - at);
}

// Rows first ... last - 1 of one image's dy, (P, Q, K), into its dx, (H, W, C). dilation_w is 1.
FK_INLINE void add_bands(const Conv2dProblem& p, const FilterRows& filter, const float* dy, float* dx, int64_t first,
                         int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t r = 0; r < p.r; ++r) {
      const int64_t h = row * p.stride_h - p.pad_h + r * p.dilation_h;
      if (h < 0 || h >= p.h) continue;
      for (int64_t i = 0; i < filter.parts(); ++i) {
        const float *const of_dy = dy + row * p.q * p.k, *const f = filter.row(r, i);
        float* const to = dx + h * p.w * p.c;
        switch (filter.lanes()) {
          case 1:
            add_rows<1>(p, of_dy, f, filter.first(i), filter.count(i), to);
            break;
          case 2:
            add_rows<2>(p, of_dy, f, filter.first(i), filter.count(i), to);
            break;
          default:
            add_rows<3>(p, of_dy, f, filter.first(i), filter.count(i), to);
        }
      }
    }
  }
}

// How many rows of dy a band has: of such bands, every second one meets rows of dx that no other of them does.
inline int64_t rows_of_band(const Conv2dProblem& p) {
  const int64_t reach = (p.r - 1) * p.dilation_h + 1;
  return std::max<int64_t>(4, (reach + p.stride_h - 1) / p.stride_h);
}

}  // namespace freezekit::cpu
