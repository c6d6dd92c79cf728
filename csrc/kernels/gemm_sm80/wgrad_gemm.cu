// Picks the instantiation of conv2d_wgrad_gemm_kernel.
#include "kernels/gemm_sm80/wgrad_gemm.h"

namespace freezekit {
namespace {

template <class T, class Tile, bool kChunksOfDy, bool kChunksOfX>
Status launch_tile(const WgradLaunch& launch) {
  using Loader = WgradLoader<T, Tile, kChunksOfDy, kChunksOfX>;
  const int64_t blocks = wgrad_blocks(launch.problem, {Tile::kRows, Tile::kColumns});
  if (blocks > kMaxGridX) return Status::invalid_argument;
  const Wgrad wgrad = make_wgrad(launch.problem, launch.split_k, Loader::Dy::kDepth);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(launch.split_k));
  return FK_LAUNCH(conv2d_wgrad_gemm_kernel<T, Tile, kChunksOfDy, kChunksOfX>, grid, dim3(Tile::kThreads),
                   size_t{kWgradStages} * Loader::kStageBytes, launch.stream, wgrad,
                   static_cast<const T*>(launch.tensors.y), static_cast<const T*>(launch.tensors.x),
                   static_cast<T*>(launch.tensors.filter),
                   static_cast<float*>(launch.split_k > 1 ? launch.workspace : nullptr));
}

template <class T>
Status launch_of(int config, const WgradLaunch& launch) {
  constexpr int64_t chunk = kChunkBytes / sizeof(T);
  const bool dy_chunks = launch.problem.k_per_group() % chunk == 0 && is_aligned_16(launch.tensors.y);
  const bool x_chunks = launch.problem.c_per_group() % chunk == 0 && is_aligned_16(launch.tensors.x);
  if (dy_chunks && x_chunks) {
    switch (config) {
      case 0:
        return launch_tile<T, WgradTile<128, 128, 2>, true, true>(launch);
      case 1:
        return launch_tile<T, WgradTile<64, 128, 1>, true, true>(launch);
      case 2:
        return launch_tile<T, WgradTile<64, 64, 2>, true, true>(launch);
      default:
        return Status::invalid_argument;
    }
  }
  using Tile = WgradTile<64, 64, 2>;
  if (dy_chunks) return launch_tile<T, Tile, true, false>(launch);
  if (x_chunks) return launch_tile<T, Tile, false, true>(launch);
  return launch_tile<T, Tile, false, false>(launch);
}

Status launch_dtype(int config, DType dtype, const WgradLaunch& launch) {
  switch (dtype) {
    case DType::bf16:
      return launch_of<bf16>(config, launch);
    case DType::f16:
      return launch_of<f16>(config, launch);
    case DType::f32:
      return launch_of<float>(config, launch);
    default:
      return Status::unsupported;
  }
}

}  // namespace

Status launch_wgrad_gemm(int config, int split_k, const Conv2dProblem& p, DType dtype, const Conv2dTensors& tensors,
                         void* workspace, Stream stream) {
  if (config < 0 || config > 2 || split_k < 1 || split_k > kMaxGridYZ) return Status::invalid_argument;
  if (split_k > 1 && !is_aligned_16(workspace)) return Status::invalid_argument;
  const Status status = launch_dtype(config, dtype, {p, split_k, tensors, workspace, stream});
  if (status != Status::success || split_k == 1) return status;
  return launch_ordered_reduce(workspace, tensors.filter, p.filter_numel(), split_k, dtype, stream);
}

}  // namespace freezekit
