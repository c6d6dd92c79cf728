// From accumulators as tensor cores leave them to runs of channels for the epilogue, for fprop and dgrad as a GEMM.
//
// Lanes of a warp hold pairs of columns in rows far apart; through a patch of shared memory a lane gets eight
// neighbouring columns of one row, the unit of the epilogue, and four lanes store a run of 32 channels.
#pragma once

#include "core/gather.h"
#include "kernels/epilogue.h"

namespace freezekit {

constexpr int kFragmentRows = 16, kFragmentColumns = 32;  // of a warp's accumulators that are finished at once
constexpr int kPatchPitch = kFragmentColumns + 8;         // floats; rows of a patch start 8 banks apart
constexpr int kPatchBytes = kFragmentRows * kPatchPitch * 4;

// Where in the output a fragment is: its phase, and its rows and columns in the phase's matrix of `rows` rows.
struct FragmentPlace {
  int32_t phase_h, phase_w;
  GatherAxis h, w;
  int32_t rows, group, row0, column0;
};

// acc[j] is the 16 x 8 fragment d of ptx::mma_m16n8k16 at columns 8 * j. Calls f(row, column, run) for the runs of eight
// columns that this lane gets.
template <class F>
FK_DEVICE void for_each_run(const float (&acc)[kFragmentColumns / 8][4], float* patch, int32_t lane, const F& f) {
#pragma unroll
  for (int j = 0; j < kFragmentColumns / 8; ++j) {
    float* const to = patch + lane / 4 * kPatchPitch + 8 * j + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(acc[j][0], acc[j][1]);
    *reinterpret_cast<float2*>(to + 8 * kPatchPitch) = make_float2(acc[j][2], acc[j][3]);
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = half * 8 + lane / 4, column = lane % 4 * 8;
    const float4* const from = reinterpret_cast<const float4*>(patch + row * kPatchPitch + column);
    const float4 low = from[0], high = from[1];
    float run[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    f(row, column, run);
  }
  __syncwarp();  // the next fragment overwrites the patch
}

template <int kFlags, class T>
FK_DEVICE void finish_fragment(const float (&acc)[kFragmentColumns / 8][4], const Gather& g, const FragmentPlace& at,
                               const EpilogueParameters<T>& epilogue, float* patch, int32_t lane) {
  for_each_run(acc, patch, lane, [&](int32_t row, int32_t run_column, float (&run)[8]) {
    const int32_t m = at.row0 + row, column = at.column0 + run_column;
    const int32_t count = g.out_c - column < 8 ? g.out_c - column : 8;
    if (m >= at.rows || count <= 0) return;
    const int64_t channel = static_cast<int64_t>(at.group) * g.out_c + column;
    int64_t offset;
    if (g.rows_are_dense()) {
      offset = static_cast<int64_t>(m) * (g.out_c * g.groups);
    } else {
      int32_t row_h, row_w;
      const int32_t n = g.decode_row(m, at.phase_h, at.phase_w, &row_h, &row_w);
      offset = g.out_offset(n, at.h.out_first + row_h * at.h.out_step, at.w.out_first + row_w * at.w.out_step);
    }
    finish_run<kFlags>(epilogue, run, offset + channel, static_cast<int32_t>(channel), count);
  });
}

}  // namespace freezekit
