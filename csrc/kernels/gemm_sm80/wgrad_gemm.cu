// Picks the instantiation of conv2d_wgrad_gemm_kernel.
#include <iterator>

#include "kernels/gemm_sm80/wgrad_gemm.h"

namespace freezekit {
namespace {

template <class T, class Tile, bool kChunksOfDy, bool kChunksOfX>
Status launch_tile(const Conv2dLaunch& launch) {
  using Loader = WgradLoader<T, Tile, kChunksOfDy, kChunksOfX>;
  const int split_k = launch.selection.split_k;
  const int64_t blocks = wgrad_blocks(launch.problem, {Tile::kRows, Tile::kColumns});
  if (blocks > kMaxGridX) return Status::invalid_argument;
  const Wgrad wgrad = make_wgrad(launch.problem, split_k, Loader::Dy::kDepth);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(split_k));
  return FK_LAUNCH(conv2d_wgrad_gemm_kernel<T, Tile, kChunksOfDy, kChunksOfX>, grid, dim3(Tile::kThreads),
                   size_t{kGemmStages} * Loader::kStageBytes, launch.stream, wgrad,
                   static_cast<const T*>(launch.tensors.y), static_cast<const T*>(launch.tensors.x),
                   static_cast<T*>(launch.tensors.filter),
                   static_cast<float*>(split_k > 1 ? launch.workspace : nullptr));
}

// Warps of a config's tile, along its rows.
constexpr int kWarpRows[] = {2, 1, 2};

template <int kConfig>
using TileOf = WgradTile<kWgradGemmTiles[kConfig].rows, kWgradGemmTiles[kConfig].columns, kWarpRows[kConfig]>;

template <class T>
Status launch_of(const Conv2dLaunch& launch) {
  constexpr int64_t chunk = kChunkBytes / sizeof(T);
  const bool dy_chunks = launch.problem.k_per_group() % chunk == 0 && is_aligned_16(launch.tensors.y);
  const bool x_chunks = launch.problem.c_per_group() % chunk == 0 && is_aligned_16(launch.tensors.x);
  return dispatch_config<std::size(kWgradGemmTiles)>(launch.selection.config, [&](auto config) {
    if (dy_chunks && x_chunks) return launch_tile<T, TileOf<config.value>, true, true>(launch);
    using Smallest = TileOf<kWgradGemmSmallest>;
    if (dy_chunks) return launch_tile<T, Smallest, true, false>(launch);
    return x_chunks ? launch_tile<T, Smallest, false, true>(launch) : launch_tile<T, Smallest, false, false>(launch);
  });
}

}  // namespace

Status launch_wgrad_gemm(const Conv2dLaunch& launch) {
  if (launch.selection.split_k > 1 && !is_aligned_16(launch.workspace)) return Status::invalid_argument;
  return dispatch_short_dtype(launch.dtype, [&](auto tag) { return launch_of<typename decltype(tag)::type>(launch); });
}

}  // namespace freezekit
