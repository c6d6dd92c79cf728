// A convolution of few positions, and its dgrad, which read the filter as it is.
//
//   products:      y[m, k] += sum over l of columns[m, l] * w[k, l]
//   combinations:  dcolumns[m, l] = sum over k of dy[m, k] * w[k, l], which are added to dx where the columns came from
//
// m is a position, l a tap and an input channel, in the order of w's memory. Libraries copy the filter into a layout of
// their own first, which at few positions costs more than the product. Here a tile of results stays in registers while
// rows of w stream by; what comes next is asked for in time, since streams end and begin too often for the processor to
// guess. It is asked into the second cache, not the nearest: that can wait for too few lines at a time to keep memory busy
// (0.8 of the time of the whole product and less, on a Zen 4). Columns are made for a tile or a few, and never leave the
// nearest cache. x and dx are (..., inputs), y and dy (rows, channels), w (channels, length), all dense.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace freezekit::cpu {

FK_INLINE void ask_for(const float* next) { __builtin_prefetch(next, /*rw=*/0, /*locality=*/2); }

struct FewRows {
  int64_t rows, channels, taps, inputs;
  int64_t tap_step, input_step;  // in a row of w: inputs and 1, or 1 and taps
  const int64_t* places;         // (rows, taps): where the inputs are that a row's tap meets; -1 if that is outside
  int64_t chunk;                 // chunk_of() all rows, whichever part of them this is

  int64_t length() const { return taps * inputs; }
  int64_t place(int64_t m, int64_t tap) const { return places[m * taps + tap]; }
};

// Of a row's columns first ... last - 1: f(where a tap's inputs are, the column of the first of them less `first`, how many).
template <class F>
FK_INLINE void for_each_tap(const FewRows& size, int64_t m, int64_t first, int64_t last, F f) {
  const bool apart = size.input_step == 1;  // one tap's columns follow each other
  const int64_t end = apart ? (last - 1) / size.inputs + 1 : size.taps;
  for (int64_t tap = apart ? first / size.inputs : 0; tap < end; ++tap) {
    const auto input = [&](int64_t l) {
      const int64_t past = l - tap * size.tap_step;
      return std::clamp<int64_t>(apart ? past : (past + size.input_step - 1) / size.input_step, 0, size.inputs);
    };
    const int64_t from = input(first), place = size.place(m, tap);
    f(place < 0 ? place : place + from, tap * size.tap_step + from * size.input_step - first, input(last) - from);
  }
}

// A tile of results: so many rows, and vectors or sums of vectors in each, as fit into the registers with what they are made of.
// Where there are fewer rows, the last one is computed again in place of the others.
constexpr int64_t kTileRows = 4;
template <int kLanes>
constexpr int kAcross = kLanes == 16 ? 4 : 3;

FK_INLINE void rows_of_tile(const float* first, int64_t step, int64_t rows, const float* (&to)[kTileRows]) {
  for (int64_t m = 0; m < kTileRows; ++m) to[m] = first + std::min(m, rows - 1) * step;
}

// Adds up the lanes of kLanes vectors: lane i of the first becomes the sum of vector i's.
template <int kLanes, int kSide = kLanes / 2>
FK_INLINE void add_lanes(typename Vector<kLanes>::Type* vectors) {
  if constexpr (kSide > 0) {
    typename Vector<kLanes>::Index low{}, high{};
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & kSide ? kLanes + lane - kSide : lane, high[lane] = lane & kSide ? kLanes + lane : lane + kSide;
    }
    for (int i = 0; i < kSide; ++i) {
      const auto first = vectors[i], second = vectors[i + kSide];
      vectors[i] = pick_lanes(first, second, low) + pick_lanes(first, second, high);
    }
    add_lanes<kLanes, kSide / 2>(vectors);
  }
}

// Columns at a time, for the nearest cache: of two tiles' rows, or of one's twice as many. (Of a filter of 3 x 3, the length is a
// multiple of 576 for each multiple of 64 channels.)
constexpr int64_t kBlock = 2 * kTileRows, kMostColumns = kBlock * 576;

inline int64_t chunk_of(const FewRows& size) { return kMostColumns / (size.rows > kTileRows ? kBlock : kTileRows); }

// A tile of y, over `count` columns. The first one that reads rows of w asks for the next ones.
template <int kLanes>
FK_INLINE void products_tile(const FewRows& size, const float* columns, int64_t rows, const float* w, int64_t channels,
                             int64_t count, bool asks, float* y) {
  constexpr int64_t kChannels = kAcross<kLanes>, kSums = 16;  // of which the last may be none
  const int64_t step = size.length();
  const float *row[kTileRows], *of_w[kChannels];
  rows_of_tile(columns, size.chunk, rows, row);
  for (int64_t k = 0; k < kChannels; ++k) of_w[k] = w + std::min(k, channels - 1) * step;
  typename Vector<kLanes>::Type acc[kSums] = {};
  int64_t l = 0;
  for (; l + kLanes <= count; l += kLanes) {
    typename Vector<kLanes>::Type filter[kChannels];
    for (int k = 0; k < kChannels; ++k) filter[k] = load<kLanes>(of_w[k] + l);
    if (asks) {
      for (int k = 0; k < kChannels; ++k) ask_for(of_w[k] + kChannels * step + l);
    }
    for (int m = 0; m < kTileRows; ++m) {
      const auto column = load<kLanes>(row[m] + l);
      for (int k = 0; k < kChannels; ++k) acc[m * kChannels + k] += column * filter[k];
    }
  }
  float sums[kSums];
  for (int64_t i = 0; i < kSums; i += kLanes) {
    add_lanes<kLanes>(acc + i);
    store(sums + i, acc[i]);
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < channels; ++k) {
      float sum = sums[m * kChannels + k];
      for (int64_t i = l; i < count; ++i) sum += row[m][i] * of_w[k][i];
      y[m * size.channels + k] += sum;
    }
  }
}

// Channels first ... last - 1, as many at a time as the second cache holds a chunk of.
template <int kLanes>
FK_INLINE void products(const FewRows& size, const float* x, const float* w, float* y, int64_t first, int64_t last) {
  constexpr int64_t kChannels = kAcross<kLanes>, kPart = 32 * kChannels;
  float columns[kMostColumns];
  for (int64_t l = 0; l < size.length(); l += size.chunk) {
    const int64_t count = std::min(size.chunk, size.length() - l);
    for (int64_t part = first; part < last; part += kPart) {
      const int64_t end = std::min(last, part + kPart);
      for (int64_t block = 0; block < size.rows; block += kBlock) {
        const int64_t rows = std::min(kBlock, size.rows - block);
        for (int64_t m = 0; m < rows; ++m) {
          for_each_tap(size, block + m, l, l + count, [&](int64_t place, int64_t at, int64_t inputs) {
            float* const to = columns + m * size.chunk + at;
            if (place < 0) {
              for (int64_t c = 0; c < inputs; ++c) to[c * size.input_step] = 0;
            } else if (size.input_step == 1) {
              for (int64_t c = 0; c < inputs; ++c) to[c] = x[place + c];
            } else {
              for (int64_t c = 0; c < inputs; ++c) to[c * size.input_step] = x[place + c];
            }
          });
        }
        for (int64_t k = part; k < end; k += kChannels) {
          for (int64_t m = 0; m < rows; m += kTileRows) {
            products_tile<kLanes>(size, columns + m * size.chunk, std::min(kTileRows, rows - m),
                                  w + k * size.length() + l, std::min(kChannels, end - k), count, block + m == 0,
                                  y + (block + m) * size.channels + k);
          }
        }
      }
    }
  }
}

// A tile of dcolumns: kVectors wide. The first one that reads rows of w asks for those that come after the next few.
template <int kLanes, int kVectors>
FK_INLINE void combinations_tile(const FewRows& size, const float* dy, int64_t rows, const float* w, bool asks,
                                 float* columns) {
  constexpr int64_t kAhead = 32;
  const int64_t step = size.length();
  const float* row[kTileRows];
  rows_of_tile(dy, size.channels, rows, row);
  typename Vector<kLanes>::Type acc[kTileRows][kVectors] = {};
  const float* next = w + kAhead * step;
  for (int64_t k = 0; k < size.channels; ++k, w += step, next += step) {
    typename Vector<kLanes>::Type filter[kVectors];
    for (int i = 0; i < kVectors; ++i) filter[i] = load<kLanes>(w + i * kLanes);
    if (asks) {
      if (k + kAhead == size.channels) next += kVectors * kLanes - size.channels * step;  // the next tile's first
      for (int i = 0; i < kVectors; ++i) ask_for(next + i * kLanes);
    }
    for (int m = 0; m < kTileRows; ++m) {
      const auto factor = typename Vector<kLanes>::Type{} + row[m][k];
      for (int i = 0; i < kVectors; ++i) acc[m][i] += filter[i] * factor;
    }
  }
  for (int m = 0; m < kTileRows; ++m) {
    for (int i = 0; i < kVectors; ++i) store(columns + (m * kVectors + i) * kLanes, acc[m][i]);
  }
}

// Adds a row's columns first ... last - 1 to dx.
FK_INLINE void add_to_inputs(const FewRows& size, int64_t m, int64_t first, int64_t last, const float* columns,
                             float* dx) {
  for_each_tap(size, m, first, last, [&](int64_t place, int64_t at, int64_t inputs) {
    if (place < 0) return;
    if (size.input_step == 1) {
      for (int64_t c = 0; c < inputs; ++c) dx[place + c] += columns[at + c];
    } else {
      for (int64_t c = 0; c < inputs; ++c) dx[place + c] += columns[at + c * size.input_step];
    }
  });
}

// Columns l ... of all rows, kVectors wide and but for the first `known`, added to dx.
template <int kLanes, int kVectors>
FK_INLINE void combine(const FewRows& size, const float* dy, const float* w, float* dx, int64_t l, int64_t known = 0) {
  constexpr int64_t kWidth = kVectors * kLanes;
  float columns[kTileRows * kWidth];
  for (int64_t first = 0; first < size.rows; first += kTileRows) {
    const int64_t rows = std::min(kTileRows, size.rows - first);
    combinations_tile<kLanes, kVectors>(size, dy + first * size.channels, rows, w + l, first == 0, columns);
    for (int64_t m = 0; m < rows; ++m) {
      add_to_inputs(size, first + m, l + known, l + kWidth, columns + m * kWidth + known, dx);
    }
  }
}

// Of vectors of 8, fewer results stay in registers, in strips so narrow that memory is slow to give them (1.4 to 2.2 times the time
// of this, of filters that no cache holds): here rows of w stream by as they are, four at a time, and results wait in the
// nearest cache. Rows first ... first + kRows - 1 of `count` columns.
template <int kRows, int kChannels>
FK_INLINE void stream_rows(const FewRows& size, const float* dy, const float* w, int64_t count, float* columns) {
  using V = Vector<8>::Type;
  V factor[kRows][kChannels];
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kChannels; ++k) factor[m][k] = V{} + dy[m * size.channels + k];
  }
  int64_t l = 0;
  for (; l + 8 <= count; l += 8) {
    V acc[kRows];
    for (int m = 0; m < kRows; ++m) acc[m] = load<8>(columns + m * count + l);
    for (int k = 0; k < kChannels; ++k) {
      const V filter = load<8>(w + k * size.length() + l);
      for (int m = 0; m < kRows; ++m) acc[m] += filter * factor[m][k];
    }
    if (l % 16 == 0) {
      for (int k = 0; k < kChannels; ++k) ask_for(w + (k + kChannels) * size.length() + l);
    }
    for (int m = 0; m < kRows; ++m) store(columns + m * count + l, acc[m]);
  }
  for (; l < count; ++l) {
    for (int m = 0; m < kRows; ++m) {
      for (int k = 0; k < kChannels; ++k) {
        columns[m * count + l] += dy[m * size.channels + k] * w[k * size.length() + l];
      }
    }
  }
}

constexpr int64_t kStreamed = 4096;  // columns of all rows

FK_INLINE void stream(const FewRows& size, const float* dy, const float* w, float* dx, int64_t first, int64_t last) {
  const int64_t count = last - first;
  float columns[kStreamed] = {};
  const auto rows = [&]<int kChannels>(int64_t k) {
    const float* const of_w = w + k * size.length() + first;
    int64_t m = 0;
    for (; m + 3 <= size.rows; m += 3) {
      stream_rows<3, kChannels>(size, dy + m * size.channels + k, of_w, count, columns + m * count);
    }
    for (; m < size.rows; ++m) {
      stream_rows<1, kChannels>(size, dy + m * size.channels + k, of_w, count, columns + m * count);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= size.channels; k += 4) rows.template operator()<4>(k);
  for (; k < size.channels; ++k) rows.template operator()<1>(k);
  for (int64_t m = 0; m < size.rows; ++m) add_to_inputs(size, m, first, last, columns + m * count, dx);
}

constexpr int64_t kWidestTile = 64;

// Inputs first ... last - 1, of at least kLanes in all. Where `first` is a multiple of kWidestTile, or one tap's inputs follow
// each other, what is added to an input has one order.
template <int kLanes>
FK_INLINE void combinations(const FewRows& size, const float* dy, const float* w, float* dx, int64_t first,
                            int64_t last) {
  const bool apart = size.input_step == 1;
  for (int64_t tap = 0; tap < (apart ? size.taps : 1); ++tap) {
    int64_t l = apart ? tap * size.inputs + first : first * size.taps;
    const int64_t end = apart ? tap * size.inputs + last : last * size.taps;
    if constexpr (kLanes == 8) {
      const int64_t most = kStreamed / size.rows, chunk = apart ? most : most / size.taps * size.taps;
      for (; l < end; l += chunk) stream(size, dy, w, dx, l, std::min(end, l + chunk));
    } else {
      for (; l + kWidestTile <= end; l += kWidestTile) combine<kLanes, 4>(size, dy, w, dx, l);
      if (l + 2 * kLanes <= end) combine<kLanes, 2>(size, dy, w, dx, l), l += 2 * kLanes;
      if (l + kLanes <= end) combine<kLanes, 1>(size, dy, w, dx, l), l += kLanes;
      if (l < end) combine<kLanes, 1>(size, dy, w, dx, end - kLanes, l - (end - kLanes));
    }
  }
}

}  // namespace freezekit::cpu
