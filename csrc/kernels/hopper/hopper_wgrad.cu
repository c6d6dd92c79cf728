// Picks the instantiation of conv2d_wgrad_hopper_gemm_kernel.
#include <algorithm>

#include "kernels/hopper/hopper_wgrad.h"

namespace freezekit {
namespace {

Status make_maps(const Conv2dProblem& p, DType dtype, const PixelBoxes& boxes, const Conv2dTensors& tensors,
                 HopperWgradMaps* maps) {
  TiledTensor dy{dtype, tensors.y, 2};
  dy.size[0] = dy.stride[0] = p.k, dy.size[1] = p.n * p.p * p.q;
  dy.box[0] = dy.box[1] = kPanel;
  const Status status = make_tensor_map(dy, &maps->dy);
  if (status != Status::success) return status;
  PixelTensor x{dtype, tensors.x, p.n, p.h, p.w, p.c, boxes};
  x.box_h = x.box_w = 1, x.pixels = kPanel;  // one phase: all have the same number of outputs
  return make_tensor_map(x, &maps->x);
}

template <class T, int kColumns>
Status launch_tile(DType dtype, const WgradLaunch& launch) {
  using Tile = HopperTile<T, kColumns>;
  const Conv2dProblem& p = launch.problem;
  Target target;
  Status status = current_target(&target);
  if (status != Status::success) return status;
  HopperWgradGrid grid;
  grid.boxes = make_pixel_boxes(make_gather(Operator::fprop, p));
  const int64_t panels = hopper_wgrad_panels(p), row_tiles = ceil_div(p.k_per_group(), Tile::kRows);
  const int64_t column_tiles = ceil_div(panels, kColumns / kPanel);
  const int64_t tiles = row_tiles * column_tiles * p.groups * launch.split_k;
  if (tiles > kMaxGridX) return Status::invalid_argument;
  grid.row_tiles = static_cast<int32_t>(row_tiles), grid.column_tiles = static_cast<int32_t>(column_tiles);
  grid.tiles = static_cast<int32_t>(tiles), grid.panels = static_cast<int32_t>(panels);
  grid.panels_per_tap = static_cast<int32_t>(ceil_div(p.c_per_group(), kPanel));
  float* const partial = static_cast<float*>(launch.split_k > 1 ? launch.workspace : nullptr);
  grid.vector = p.c_per_group() % 8 == 0 && is_aligned_16(partial ? partial : launch.tensors.filter);
  HopperWgradMaps maps;
  status = make_maps(p, dtype, grid.boxes, launch.tensors, &maps);
  if (status != Status::success) return status;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, target.sm_count));  // persistent
  return FK_LAUNCH(conv2d_wgrad_hopper_gemm_kernel<T, Tile>, dim3(blocks), dim3(kHopperThreads), Tile::kSharedBytes,
                   launch.stream, make_wgrad(p, launch.split_k, kPanel), grid, maps,
                   static_cast<T*>(launch.tensors.filter), partial);
}

template <class T>
Status launch_of(int config, DType dtype, const WgradLaunch& launch) {
  static_assert(kHopperTiles[0].columns == 256 && kHopperTiles[1].columns == 128 && kHopperTiles[2].columns == 64);
  switch (config) {
    case 0:
      return launch_tile<T, 256>(dtype, launch);
    case 1:
      return launch_tile<T, 128>(dtype, launch);
    case 2:
      return launch_tile<T, 64>(dtype, launch);
    default:
      return Status::invalid_argument;
  }
}

}  // namespace

Status launch_hopper_wgrad_kernel(int config, DType dtype, const WgradLaunch& launch) {
  return dtype == DType::bf16 ? launch_of<bf16>(config, dtype, launch) : launch_of<f16>(config, dtype, launch);
}

}  // namespace freezekit
