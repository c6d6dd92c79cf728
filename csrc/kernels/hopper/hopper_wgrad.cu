// Picks the instantiation of conv2d_wgrad_hopper_gemm_kernel.
#include <algorithm>
#include <iterator>

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
Status launch_tile(const Conv2dLaunch& launch) {
  using Tile = HopperTile<T, kColumns>;
  const Conv2dProblem& p = launch.problem;
  const int split_k = launch.selection.split_k;
  Target target;
  Status status = current_target(&target);
  if (status != Status::success) return status;
  HopperWgradGrid grid;
  grid.boxes = make_pixel_boxes(make_gather(Operator::fprop, p));
  const int64_t panels = hopper_wgrad_panels(p), row_tiles = ceil_div(p.k_per_group(), Tile::kRows);
  const int64_t column_tiles = ceil_div(panels, kColumns / kPanel);
  const int64_t tiles = row_tiles * column_tiles * p.groups * split_k;
  if (tiles > kMaxGridX) return Status::invalid_argument;
  grid.row_tiles = static_cast<int32_t>(row_tiles), grid.column_tiles = static_cast<int32_t>(column_tiles);
  grid.tiles = static_cast<int32_t>(tiles), grid.panels = static_cast<int32_t>(panels);
  grid.panels_per_tap = static_cast<int32_t>(ceil_div(p.c_per_group(), kPanel));
  float* const partial = static_cast<float*>(split_k > 1 ? launch.workspace : nullptr);
  grid.vector = p.c_per_group() % 8 == 0 && is_aligned_16(partial ? partial : launch.tensors.filter);
  HopperWgradMaps maps;
  status = make_maps(p, launch.dtype, grid.boxes, launch.tensors, &maps);
  if (status != Status::success) return status;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, target.sm_count));  // persistent
  return FK_LAUNCH(conv2d_wgrad_hopper_gemm_kernel<T, Tile>, dim3(blocks), dim3(kHopperThreads), Tile::kSharedBytes,
                   launch.stream, make_wgrad(p, split_k, kPanel), grid, maps, static_cast<T*>(launch.tensors.filter),
                   partial);
}

template <class T>
Status launch_of(const Conv2dLaunch& launch) {
  return dispatch_config<std::size(kHopperTiles)>(
      launch.selection.config, [&](auto config) { return launch_tile<T, kHopperTiles[config.value].columns>(launch); });
}

}  // namespace

Status launch_hopper_wgrad_kernel(const Conv2dLaunch& launch) {
  return launch.dtype == DType::bf16 ? launch_of<bf16>(launch) : launch_of<f16>(launch);
}

}  // namespace freezekit
