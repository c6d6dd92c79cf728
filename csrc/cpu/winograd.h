// Convolutions of 3 x 3 at stride 1 in float32 by Winograd's F(2 x 2, 3 x 3): 16 products for 4 results in place of 36.
//
//   y = 1/4 * A^T [sum over channels of (G g G^T) * (B^T d B)] A,  * element by element
//
//         | 1  0 -1  0 |        | 2  0  0 |          | 1  1  1  0 |
//   B^T = | 0  1  1  0 |    G = | 1  1  1 |    A^T = | 0  1 -1 -1 |
//         | 0 -1  1  0 |        | 1 -1  1 |
//         | 0  1  0 -1 |        | 0  0  2 |
//
// g is a filter, d a tile of 4 x 4 elements of the input, y one of 2 x 2 of the output; tiles overlap by two. G is twice the
// usual one, so that it is exact on integers and loses nothing that is small; 1/4 makes up for it. (S. Winograd, 1980;
// matrices as A. Lavin and S. Gray, 2015.) What is left is a product of matrices at each of the 16 points. For a block of
// tiles they stay in the caches. Roles are chosen so that vectors go along what is contiguous, and no layout is converted:
//
//   M[i][j] = sum over l of A[i][l] * B[l][j]      i               l              j
//   NHWC                                           tile            input channel  output channel
//   NCHW                                           output channel  input channel  tile
//
// A is stored row by row, B in panels of kColumns columns: B[j / kColumns][l][j % kColumns]. A dgrad is the convolution by the
// filter turned by half a turn, with its channels swapped: other steps, of other signs, express that.
//
// A result reads its own window of 3 x 3 alone, not all of the tile: the rows of B^T that the first row of A^T adds up leave
// out the fourth element, those of its second row the first one. It is finite only if everything is that it was made of,
// since sums and products of infinities and NaN are not. So where direct convolution would give something else, or an
// intermediate result has overflowed, it shows in the results.
//
// The sums' errors are relative to the largest weight of a filter. What a weight keeps out of a product that is 0, or next to
// nothing beside the largest, leaves a rounding error there. So filters are refused that lean on some of their weights (masked,
// pruned, the identity, a narrow Gaussian): where their direct results are exact zeros, or tiny and positive, ours were not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd.h"

namespace freezekit::cpu {

struct Winograd {
  int64_t n, in, out;    // images, channels of the input and of the output: multiples of kWinogradUnit
  int64_t h, w, p, q;    // sizes of the input and of the output
  int64_t pad_h, pad_w;  // rows and columns of zeros before the input; fewer than none cut it
  bool nhwc;             // the layout of both, else NCHW

  int64_t tile_rows() const { return (p + 1) / 2; }
  int64_t tile_columns() const { return (q + 1) / 2; }
  int64_t tiles() const { return n * tile_rows() * tile_columns(); }
};

constexpr int64_t kWinogradUnit = 32;  // whole panels
// Less than 1 of so many. Of normal random filters 1 in 70 has such a weight, and in 61 trained layers at most 0.23 of what a
// channel's filters weigh (each by its largest weight) belongs to filters that have.
constexpr float kNextToNothing = 1024;

struct WinogradFilter {
  const float* first;     // tap (0, 0) of output 0 and input 0
  int64_t out, in, r, s;  // steps
};

// The matrices of all points, for filters in A or B as said above, and for one block of tiles.
template <int kLanes>
class WinogradBlock {
  using V = typename Vector<kLanes>::Type;
  // A tile of M that stays in registers.
  static constexpr int64_t kRows = kLanes == 16 ? 8 : 6, kColumns = 2 * kLanes;
  static constexpr int64_t kApart = 16;  // between points, which else meet in one set of the nearest cache

 public:
  static constexpr int64_t kTiles = 96;  // whole numbers of both; at 64 channels the second cache holds all matrices

  explicit WinogradBlock(const Winograd& size)
      : size_(size), rows_(up_to(size.nhwc ? kTiles : size.out, kRows)), columns_(size.nhwc ? size.out : kTiles),
        a_(rows_ * size.in + kApart), b_(columns_ * size.in + kApart), m_(rows_ * columns_ + kApart) {}

  // Elements of the transformed filters, and of what a block needs besides.
  int64_t filter_numel() const { return 16 * (size_.nhwc ? b_ : a_); }
  int64_t workspace_numel() const { return 16 * ((size_.nhwc ? a_ : b_) + m_) + size_.in; }

  // Transforms the filters of units first ... last - 1 of output channels; returns whether none leans on some of its weights.
  FK_INLINE bool transform_filter(const WinogradFilter& f, float* u, int64_t first, int64_t last) const {
    bool taken = true;
    for (int64_t o = first * kWinogradUnit; o < last * kWinogradUnit; o += kLanes) {
      V leaning[kLanes] = {};
      for (int64_t i = 0; i < size_.in; i += kLanes) transform_filters(f, u, o, i, leaning);
      taken = taken && !leans(leaning);
    }
    return taken;
  }

  // Tiles first ... last - 1; returns whether all results are finite.
  FK_INLINE bool run(const float* x, const float* u, float* y, float* workspace, int64_t first, int64_t last) const {
    float *const v = workspace, *const m = v + 16 * (size_.nhwc ? a_ : b_), *const zeros = m + 16 * m_;
    std::fill(zeros, zeros + size_.in, 0.0f);
    V faults{};
    for (int64_t tile = first; tile < last; tile += kTiles) {
      const int64_t count = std::min(kTiles, last - tile);
      const Runs runs = runs_of(tile, count);
      if (size_.nhwc) {
        input_nhwc(x, zeros, v, runs, count);
        for (int j = 0; j < 16; ++j) multiply(v + j * a_, u + j * b_, m + j * m_, up_to(count, kRows), columns_);
        output_nhwc(m, y, runs, faults);
      } else {
        input_nchw(x, v, runs, count);
        for (int j = 0; j < 16; ++j) multiply(u + j * a_, v + j * b_, m + j * m_, rows_, up_to(count, kColumns));
        output_nchw(m, y, runs, count, faults);
      }
    }
    float lanes[kLanes];
    store(lanes, faults);
    return std::all_of(lanes, lanes + kLanes, [](float fault) { return fault == 0; });
  }

 private:
  static int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

  // Products by G, B^T and A^T, of columns whose elements are `step` apart.
  FK_INLINE static void by_g(const V* g, V* to, int step) {
    const V ends = g[0] + g[2 * step];
    to[0] = g[0] + g[0], to[step] = ends + g[step], to[2 * step] = ends - g[step],
    to[3 * step] = g[2 * step] + g[2 * step];
  }
  FK_INLINE static void by_b(const V* d, V* to, int step) {
    to[0] = d[0] - d[2 * step], to[step] = d[step] + d[2 * step];
    to[2 * step] = d[2 * step] - d[step], to[3 * step] = d[step] - d[3 * step];
  }
  FK_INLINE static void by_a(const V* m, V* to, int step) {
    to[0] = m[0] + m[step] + m[2 * step], to[step] = m[step] - m[2 * step] - m[3 * step];
  }

  // Of one filter's 9 taps: twice the largest if one is next to nothing beside it, else minus the largest.
  FK_INLINE static V leaning_of(const V* g) {
    V most{}, least = V{} + std::numeric_limits<float>::infinity();
    for (int tap = 0; tap < 9; ++tap) {
      const V size = g[tap] < 0.0f ? -g[tap] : g[tap];
      most = size > most ? size : most, least = size < least ? size : least;
    }
    return least * kNextToNothing < most ? 2.0f * most : -most;
  }
  // Whether such filters are more than a third of an output channel. In NHWC it is a lane of all vectors, else a vector.
  FK_INLINE bool leans(const V* by_filter) const {
    float lanes[kLanes][kLanes];
    std::memcpy(lanes, by_filter, sizeof(lanes));
    for (int a = 0; a < kLanes; ++a) {
      float sum = 0;
      for (int b = 0; b < kLanes; ++b) sum += size_.nhwc ? lanes[b][a] : lanes[a][b];
      if (sum > 0) return true;
    }
    return false;
  }

  // Filters of output channels o ... o + kLanes - 1 and as many input channels. The one of both that is the further apart in
  // memory is the outer one while they are read.
  FK_INLINE void transform_filters(const WinogradFilter& f, float* u, int64_t o, int64_t i, V* leaning) const {
    float taps[9][kLanes][kLanes];  // the last is what vectors go along: outputs in NHWC, inputs in NCHW
    const float* const from = f.first + o * f.out + i * f.in;
    const bool by_output = f.out > f.in, outer_is_lane = by_output == size_.nhwc;
    const int64_t outer = by_output ? f.out : f.in, inner = by_output ? f.in : f.out;
    for (int a = 0; a < kLanes; ++a) {
      for (int tap = 0; tap < 9; ++tap) {
        const float* const row = from + a * outer + tap / 3 * f.r + tap % 3 * f.s;
        for (int b = 0; b < kLanes; ++b) (outer_is_lane ? taps[tap][b][a] : taps[tap][a][b]) = row[b * inner];
      }
    }
    for (int other = 0; other < kLanes; ++other) {
      V g[9], rows[12], made[16];
      for (int tap = 0; tap < 9; ++tap) g[tap] = load<kLanes>(taps[tap][other]);
      leaning[other] += leaning_of(g);
      for (int s = 0; s < 3; ++s) by_g(g + s, rows + s, 3);
      for (int r = 0; r < 4; ++r) by_g(rows + 3 * r, made + 4 * r, 1);
      float* const to = u + (size_.nhwc ? in_panels(i + other, o) : (o + other) * size_.in + i);
      for (int j = 0; j < 16; ++j) store(to + j * (size_.nhwc ? b_ : a_), made[j]);
    }
  }

  FK_INLINE int64_t in_panels(int64_t l, int64_t j) const {
    return (j / kColumns * size_.in + l) * kColumns + j % kColumns;
  }

  FK_INLINE static void transform_input(const V* d, float* to, int64_t step) {
    V rows[16], made[16];
    for (int s = 0; s < 4; ++s) by_b(d + s, rows + s, 4);
    for (int r = 0; r < 4; ++r) by_b(rows + 4 * r, made + 4 * r, 1);
    for (int j = 0; j < 16; ++j) store(to + j * step, made[j]);
  }

  // The 2 x 2 results; what is added to faults is NaN if one of them is not finite.
  FK_INLINE void transform_output(const float* m, V* y, V& faults) const {
    V of_m[16], rows[8];
    for (int j = 0; j < 16; ++j) of_m[j] = load<kLanes>(m + j * m_);
    for (int s = 0; s < 4; ++s) by_a(of_m + s, rows + s, 4);
    for (int r = 0; r < 2; ++r) by_a(rows + 4 * r, y + 2 * r, 1);
    for (int j = 0; j < 4; ++j) y[j] *= 0.25f, faults += y[j] - y[j];
  }

  // Tiles side by side: where they are, and their first one's place in the block.
  struct Run {
    int64_t image, row, column, length, offset;
  };
  struct Runs {
    Run all[kTiles];
    int64_t count = 0;
    const Run* begin() const { return all; }
    const Run* end() const { return all + count; }
  };
  FK_INLINE Runs runs_of(int64_t first, int64_t count) const {
    const int64_t columns = size_.tile_columns(), rows = size_.tile_rows();
    Runs runs;
    for (int64_t i = 0; i < count; i += runs.all[runs.count++].length) {
      const int64_t row = (first + i) / columns, column = (first + i) % columns;
      runs.all[runs.count] = {row / rows, row % rows, column, std::min(columns - column, count - i), i};
    }
    return runs;
  }

  FK_INLINE void input_nhwc(const float* x, const float* zeros, float* v, const Runs& runs, int64_t count) const {
    for (const Run& run : runs) {
      for (int64_t i = 0; i < run.length; ++i) {
        const float* at[16];
        for (int j = 0; j < 16; ++j) {
          const int64_t h = 2 * run.row - size_.pad_h + j / 4, w = 2 * (run.column + i) - size_.pad_w + j % 4;
          const bool inside = h >= 0 && h < size_.h && w >= 0 && w < size_.w;
          at[j] = inside ? x + ((run.image * size_.h + h) * size_.w + w) * size_.in : zeros;
        }
        for (int64_t c = 0; c < size_.in; c += kLanes) {
          V d[16];
          for (int j = 0; j < 16; ++j) d[j] = load<kLanes>(at[j] + c);
          transform_input(d, v + (run.offset + i) * size_.in + c, a_);
        }
      }
    }
    const int64_t end = up_to(count, kRows);
    for (int j = 0; j < 16; ++j) std::fill(v + j * a_ + count * size_.in, v + j * a_ + end * size_.in, 0.0f);
  }

  FK_INLINE void output_nhwc(const float* m, float* y, const Runs& runs, V& faults) const {
    for (const Run& run : runs) {
      const bool below = 2 * run.row + 1 < size_.p;
      for (int64_t i = 0; i < run.length; ++i) {
        const int64_t column = 2 * (run.column + i);
        const bool beside = column + 1 < size_.q;
        float* const to = y + ((run.image * size_.p + 2 * run.row) * size_.q + column) * size_.out;
        float *const right = to + size_.out, *const under = to + size_.q * size_.out;
        for (int64_t k = 0; k < size_.out; k += kLanes) {
          V made[4];
          transform_output(m + (run.offset + i) * size_.out + k, made, faults);
          store(to + k, made[0]);
          if (beside) store(right + k, made[1]);
          if (below) store(under + k, made[2]);
          if (below && beside) store(under + size_.out + k, made[3]);
        }
      }
    }
  }

  // In NCHW whole vectors are read and written, so what a run does not fill spills over into the next one's place.
  using Row = float[2 * (kTiles + kLanes) + 2];
  using Tiles = float[kTiles + kLanes];

  // One channel's row of the input, from column w on: the four columns of each tile.
  FK_INLINE void gather_row(const float* x, int64_t w, int64_t length, float* d) const {
    Row row;
    const int64_t whole = up_to(length, kLanes), count = 2 * length + 2;
    const int64_t before = std::clamp<int64_t>(-w, 0, count), end = std::clamp<int64_t>(size_.w - w, before, count);
    std::fill(row, row + before, 0.0f);
    std::memcpy(row + before, x + w + before, (end - before) * sizeof(float));
    std::fill(row + end, row + 2 * whole + 2, 0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int s = 0; s < 4; ++s) d[s * (kTiles + kLanes) + i + lane] = row[2 * (i + lane) + s];
      }
    }
  }

  FK_INLINE void input_nchw(const float* x, float* v, const Runs& runs, int64_t count) const {
    Tiles d[4][4] = {};
    for (int64_t c = 0; c < size_.in; ++c) {
      for (const Run& run : runs) {
        for (int r = 0; r < 4; ++r) {
          const int64_t h = 2 * run.row - size_.pad_h + r;
          if (h >= 0 && h < size_.h) {
            const float* const from = x + ((run.image * size_.in + c) * size_.h + h) * size_.w;
            gather_row(from, 2 * run.column - size_.pad_w, run.length, d[r][0] + run.offset);
          } else {
            for (Tiles& column : d[r]) std::fill_n(column + run.offset, run.length, 0.0f);
          }
        }
      }
      for (int64_t i = 0; i < up_to(count, kColumns); i += kLanes) {
        V of_d[16];
        for (int j = 0; j < 16; ++j) of_d[j] = load<kLanes>(d[j / 4][j % 4] + i);
        transform_input(of_d, v + in_panels(c, i), b_);
      }
    }
  }

  FK_INLINE void output_nchw(const float* m, float* y, const Runs& runs, int64_t count, V& faults) const {
    Tiles made[2][2];
    for (int64_t k = 0; k < size_.out; ++k) {
      for (int64_t i = 0; i < count; i += kLanes) {
        V of_y[4];
        transform_output(m + k * columns_ + i, of_y, faults);
        for (int j = 0; j < 4; ++j) store(made[j / 2][j % 2] + i, of_y[j]);
      }
      for (const Run& run : runs) {
        for (int64_t r = 0; r < std::min<int64_t>(2, size_.p - 2 * run.row); ++r) {
          Row row;
          const float *const even = made[r][0] + run.offset, *const odd = made[r][1] + run.offset;
          for (int64_t i = 0; i < run.length; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) {
              row[2 * (i + lane)] = even[i + lane], row[2 * (i + lane) + 1] = odd[i + lane];
            }
          }
          float* const to = y + ((run.image * size_.out + k) * size_.p + 2 * run.row + r) * size_.q + 2 * run.column;
          std::memcpy(to, row, std::min(2 * run.length, size_.q - 2 * run.column) * sizeof(float));
        }
      }
    }
  }

  // Whatever the block and the place in it, a sum over l has one order.
  FK_INLINE void multiply(const float* a, const float* b, float* m, int64_t rows, int64_t columns) const {
    const int64_t length = size_.in;
    for (int64_t j = 0; j < columns; j += kColumns) {
      for (int64_t i = 0; i < rows; i += kRows) {
        const float *const of_a = a + i * length, *const of_b = b + j * length;
        V sums[kRows][2] = {};
        for (int64_t l = 0; l < length; ++l) {
          const V first = load<kLanes>(of_b + l * kColumns), second = load<kLanes>(of_b + l * kColumns + kLanes);
          for (int r = 0; r < kRows; ++r) {
            const V factor = V{} + of_a[r * length + l];
            sums[r][0] += factor * first, sums[r][1] += factor * second;
          }
        }
        for (int r = 0; r < kRows; ++r) {
          float* const to = m + (i + r) * columns_ + j;
          store(to, sums[r][0]), store(to + kLanes, sums[r][1]);
        }
      }
    }
  }

  Winograd size_;
  int64_t rows_, columns_;  // of M
  int64_t a_, b_, m_;       // steps from a point to the next
};

template <int kLanes>
FK_INLINE bool winograd_filter(const WinogradBlock<kLanes>& block, const WinogradFilter& f, float* u, int64_t first,
                               int64_t last) {
  return block.transform_filter(f, u, first, last);
}
template <int kLanes>
FK_INLINE bool winograd_run(const WinogradBlock<kLanes>& block, const float* x, const float* u, float* y,
                            float* workspace, int64_t first, int64_t last) {
  return block.run(x, u, y, workspace, first, last);
}

}  // namespace freezekit::cpu
