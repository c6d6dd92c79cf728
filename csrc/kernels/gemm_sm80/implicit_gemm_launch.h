// Picks the instantiation of conv2d_implicit_gemm_kernel for one dtype. Each dtype's .cu file instantiates it once.
#pragma once

#include <iterator>

#include "kernels/gemm_sm80/implicit_gemm.h"

namespace freezekit {

template <class T, class Tile, Access kAccess>
Status launch_implicit_gemm_tile(const Gather& g, const T* in, const T* filter, const EpilogueParameters<T>& epilogue,
                                 Stream stream) {
  const int64_t blocks = gather_blocks(g, {Tile::kRows, Tile::kColumns});
  if (blocks > kMaxGridX || g.phases_h > kMaxGridYZ || g.phases_w > kMaxGridYZ) return Status::invalid_argument;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(g.phases_h), static_cast<unsigned>(g.phases_w));
  const bool affine_alone = !epilogue.residual && !epilogue.relu && !epilogue.mask_in;
  const auto kernel = affine_alone ? conv2d_implicit_gemm_kernel<T, Tile, kAccess, kEpilogueAffine>
                                   : conv2d_implicit_gemm_kernel<T, Tile, kAccess, kEpilogueAll>;
  return FK_LAUNCH(kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, g, in, filter, epilogue);
}

template <class T, class Tile>
Status launch_implicit_gemm_chunks(const Gather& g, const T* in, const T* filter, const EpilogueParameters<T>& epilogue,
                                   Stream stream) {
  if (g.is_pointwise()) return launch_implicit_gemm_tile<T, Tile, Access::pointwise>(g, in, filter, epilogue, stream);
  return launch_implicit_gemm_tile<T, Tile, Access::chunks>(g, in, filter, epilogue, stream);
}

// Warps of a config's tile, along its rows.
constexpr int kGemmWarpRows[] = {2, 2, 2, 4, 2};

template <class T>
Status launch_implicit_gemm_of(const Conv2dLaunch& launch, const void* filter_bytes) {
  const Gather g = make_gather(launch.op, launch.problem);
  const Stream stream = launch.stream;
  const T *const in = static_cast<const T*>(launch.in()), *const filter = static_cast<const T*>(filter_bytes);
  const auto parameters = epilogue_parameters<T>(launch.epilogue, launch.out(), g.out_c);
  const Status status = launch_mask_prepare(launch.epilogue.mask_out, g.out_numel(), parameters.vector, stream);
  if (status != Status::success) return status;
  const bool whole_chunks = g.in_c % (kChunkBytes / sizeof(T)) == 0 && is_aligned_16(in) && is_aligned_16(filter);
  const int config = whole_chunks ? launch.selection.config : kImplicitGemmElements;
  return dispatch_config<std::size(kImplicitGemmTiles)>(config, [&](auto i) {
    constexpr Tile size = kImplicitGemmTiles[i.value];
    using Shape = GemmTile<size.rows, size.columns, kGemmWarpRows[i.value], kGemmStages>;
    if constexpr (i.value == kImplicitGemmElements) {
      return launch_implicit_gemm_tile<T, Shape, Access::elements>(g, in, filter, parameters, stream);
    } else {
      return launch_implicit_gemm_chunks<T, Shape>(g, in, filter, parameters, stream);
    }
  });
}

}  // namespace freezekit
