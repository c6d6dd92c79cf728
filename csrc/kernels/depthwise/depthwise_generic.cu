// Depthwise fprop, dgrad and wgrad of any filter, stride, dilation, padding, multiplier, channel count and dtype.
//
//   fprop:  y[n, p, q, k] = epilogue(sum over r, s of x[n, h, w, k / m] * f[k, r, s])         m: the multiplier K / C
//   dgrad:  dx[n, h, w, c] = epilogue(sum over r, s and j < m of dy[n, p, q, c * m + j] * f[c * m + j, r, s])
//   wgrad:  dw[k, r, s] = sum over n, p, q of dy[n, p, q, k] * x[n, h, w, k / m]
//
// Layouts: x, y NHWC, filter KRSC with one channel per group; no alignment beyond the element's. core/gather.h and
// core/wgrad.h say which positions meet. fprop and dgrad: a thread makes eight neighbouring channels of one position;
// neighbouring threads share the lines they read. wgrad: a warp takes 32 channels at one tap; 8 warps and the slices of
// blockIdx.y cut the positions, and their sums are added in a fixed order.
#include "core/wgrad.h"
#include "kernels/epilogue.h"
#include "kernels/families.h"

namespace freezekit {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = kDepthwiseChannels;
constexpr int kWarps = kDepthwiseWarps;

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    depthwise_generic_gather_kernel(const Gather g, const T* __restrict__ in, const T* __restrict__ filter,
                                    const EpilogueParameters<T> epilogue) {
  using Acc = Accumulator<T>;
  const int32_t phase_h = static_cast<int32_t>(blockIdx.y), phase_w = static_cast<int32_t>(blockIdx.z);
  const GatherAxis h = g.axis_h(phase_h), w = g.axis_w(phase_w);
  const int32_t out_channels = g.out_c * g.groups;
  const int32_t runs = (out_channels + 7) / 8, taps = g.h.taps * g.w.taps;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int32_t channel = static_cast<int32_t>(thread % runs) * 8;
  const int64_t m = thread / runs;
  if (m >= g.batch * h.count * w.count) return;
  int32_t row_h, row_w;
  const int32_t n = g.decode_row(static_cast<int32_t>(m), phase_h, phase_w, &row_h, &row_w);
  const int32_t ih0 = h.in_first + row_h * h.in_stride, iw0 = w.in_first + row_w * w.in_stride;
  const int32_t count = min(out_channels - channel, 8);

  Acc acc[8] = {};
  for (int32_t t = 0; t < h.taps * w.taps; ++t) {
    const int32_t tap_h = t / w.taps, tap_w = t % w.taps;
    const int32_t ih = ih0 + tap_h * h.in_step, iw = iw0 + tap_w * w.in_step;
    if (ih < 0 || ih >= g.in_h || iw < 0 || iw >= g.in_w) continue;
    const T* const from = in + g.in_offset(n, ih, iw);
    const int32_t tap = (h.filter_first + tap_h * h.filter_step) * g.w.taps + w.filter_first + tap_w * w.filter_step;
#pragma unroll
    for (int32_t e = 0; e < 8; ++e) {
      if (e >= count) continue;
      // One of the two has a single channel per group: in_c is 1 for fprop, out_c for dgrad.
      const int32_t group = (channel + e) / g.out_c;
      for (int32_t j = 0; j < g.in_c; ++j) {
        const int32_t c = group * g.in_c + j, k = g.transposed ? c : channel + e;
        acc[e] +=
            cast<Acc>(load_global(from + c)) * cast<Acc>(load_global(filter + static_cast<int64_t>(k) * taps + tap));
      }
    }
  }
  const int64_t offset = g.out_offset(n, h.out_first + row_h * h.out_step, w.out_first + row_w * w.out_step) + channel;
  finish_run<kEpilogueAll>(epilogue, acc, offset, channel, count);
}

template <class T>
__global__ void __launch_bounds__(kLanes* kWarps)
    depthwise_generic_wgrad_kernel(const Wgrad p, const T* __restrict__ dy, const T* __restrict__ x,
                                   Accumulator<T>* __restrict__ partial) {
  using Acc = Accumulator<T>;
  FK_SHARED(Acc, sums, [kWarps][kLanes]);
  const int32_t taps = p.h.taps * p.w.taps, tap = static_cast<int32_t>(blockIdx.x) % taps;
  const int32_t lane = static_cast<int32_t>(threadIdx.x), warp = static_cast<int32_t>(threadIdx.y);
  const int32_t k = static_cast<int32_t>(blockIdx.x) / taps * kLanes + lane, channels = p.k * p.groups;
  const int32_t begin = static_cast<int32_t>(blockIdx.y) * p.positions_per_slice;
  const int32_t end = min(begin + p.positions_per_slice, p.positions);
  const WgradColumn column = p.column(tap);  // one channel per group: column j of the GEMM is tap j

  Acc sum = 0;
  if (k < channels) {
    for (int32_t l = begin + warp; l < end; l += kWarps) {
      int32_t there;
      if (!p.meet(p.position(l), column, &there)) continue;
      sum += cast<Acc>(load_global(dy + l * p.k_all() + k)) * cast<Acc>(load_global(x + there * p.c_all() + k / p.k));
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || k >= channels) return;
  for (int32_t i = 1; i < kWarps; ++i) sum += sums[i][lane];
  store_global(partial + blockIdx.y * p.dw_numel() + static_cast<int64_t>(k) * taps + tap, sum);
}

}  // namespace

Status launch_depthwise_generic_gather(const Conv2dLaunch& launch) {
  if (launch.problem.c_per_group() != 1) return Status::invalid_argument;
  const Gather g = make_gather(launch.op, launch.problem);
  const int64_t channels = static_cast<int64_t>(g.out_c) * g.groups;
  const int64_t blocks = ceil_div(g.max_rows() * ceil_div(channels, 8), kThreads);
  if (blocks > kMaxGridX || g.phases_h > kMaxGridYZ || g.phases_w > kMaxGridYZ) return Status::invalid_argument;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(g.phases_h), static_cast<unsigned>(g.phases_w));
  return dispatch_dtype(launch.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto parameters = epilogue_parameters<T>(launch.epilogue, launch.out(), channels);
    const Status status =
        launch_mask_prepare(launch.epilogue.mask_out, g.out_numel(), parameters.vector, launch.stream);
    if (status != Status::success) return status;
    return FK_LAUNCH(depthwise_generic_gather_kernel<T>, grid, dim3(kThreads), 0, launch.stream, g,
                     static_cast<const T*>(launch.in()), static_cast<const T*>(launch.tensors.filter), parameters);
  });
}

Status launch_depthwise_generic_wgrad(const Conv2dLaunch& launch) {
  const Conv2dProblem& p = launch.problem;
  const int64_t blocks = ceil_div(p.k, kLanes) * p.r * p.s;
  if (p.c_per_group() != 1 || blocks > kMaxGridX) return Status::invalid_argument;
  const Wgrad wgrad = make_wgrad(p, launch.selection.split_k, kWarps);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(launch.selection.split_k));
  return dispatch_dtype(launch.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return FK_LAUNCH(depthwise_generic_wgrad_kernel<T>, grid, dim3(kLanes, kWarps), 0, launch.stream, wgrad,
                     static_cast<const T*>(launch.tensors.y), static_cast<const T*>(launch.tensors.x),
                     static_cast<Accumulator<T>*>(launch.workspace));
  });
}

}  // namespace freezekit
