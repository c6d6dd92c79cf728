// Into how many slices a wgrad's reduction over positions is cut: the number of the least estimated time.
//
// Times are in bytes that a multiprocessor moves from or to memory meanwhile, so that work and partial sums compare:
//
//   time(split_k) = blocks of the fullest multiprocessor * positions of a slice * bytes_per_position
//                 + bytes of partial sums, written and read, of a multiprocessor
//
// The rates behind it are those of data sheets, not measured ones.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/families.h"

namespace freezekit {

struct SplitCosts {
  int64_t blocks;             // of one slice
  double bytes_per_position;  // moved while one block adds one position
  int64_t slice_bytes;        // partial sums of one slice
  int64_t least_positions;    // of a slice
  int64_t resident;           // blocks that between them keep a multiprocessor busy
};

// Products in the time of a byte: sm_80 multiplies 1024 pairs of 16 bits, half as many through tf32, 64 of fp32 and 32
// of fp64 a clock and multiprocessor, and gets 13 bytes (2.0 TB/s over 108 at 1.41 GHz); sm_90's numbers have about the
// same ratios, but twice as many products where wgmma feeds its tensor cores.
constexpr double kProductsPerByte16 = 80, kProductsPerByteTf32 = 40, kProductsPerByteWgmma = 160;
constexpr double kProductsPerByteF32 = 5, kProductsPerByteF64 = 2.5;

constexpr int64_t kMaxSplitBytes = int64_t{64} << 20;

// Blocks that take turns hide each other's waits: each one that is missing is assumed to cost 0.4 of a block's time.
// Starting a block and filling its ring of copies is as much as this many positions.
constexpr double kMissing = 0.4;
constexpr int64_t kPositionsToStart = 64;

inline double estimated_split_time(const SplitCosts& costs, int64_t split_k, int64_t positions, int64_t sm_count) {
  const int64_t fullest = (costs.blocks * split_k + sm_count - 1) / sm_count;
  const int64_t missing = (costs.resident - fullest % costs.resident) % costs.resident;
  const double rounds = static_cast<double>(fullest) + kMissing * static_cast<double>(missing);
  const int64_t slice = (positions + split_k - 1) / split_k + kPositionsToStart;
  const double sums = split_k > 1 ? 2.0 * static_cast<double>(split_k * costs.slice_bytes) / sm_count : 0;
  return rounds * static_cast<double>(slice) * costs.bytes_per_position + sums;
}

inline int64_t choose_split_k(const SplitCosts& costs, int64_t positions, int sm_count_or_none) {
  constexpr int64_t kMostBlocks = 8;  // a multiprocessor; more only add partial sums
  const int64_t sm_count = std::max(sm_count_or_none, 1);
  const int64_t by_memory = kMaxSplitBytes / std::max<int64_t>(costs.slice_bytes, 1);
  const int64_t limit = std::min({positions / costs.least_positions, by_memory, kMaxGridYZ});
  int64_t best = 1;
  double best_time = estimated_split_time(costs, 1, positions, sm_count);
  for (int64_t blocks = 1; blocks <= kMostBlocks; ++blocks) {
    // As many slices as leave no multiprocessor with more blocks than that.
    const int64_t split_k = std::min(blocks * sm_count / std::max<int64_t>(costs.blocks, 1), limit);
    if (split_k <= best) continue;
    const double time = estimated_split_time(costs, split_k, positions, sm_count);
    if (time < best_time) best = split_k, best_time = time;
  }
  return best;
}

}  // namespace freezekit
