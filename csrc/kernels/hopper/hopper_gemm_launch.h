// Picks the instantiation of conv2d_hopper_gemm_kernel for one dtype. Each dtype's .cu file instantiates it once.
#pragma once

#include <algorithm>
#include <iterator>

#include "kernels/hopper/hopper_gemm.h"

namespace freezekit {

template <class T>
Status make_hopper_maps(const Gather& g, DType dtype, const PixelBoxes& boxes, const void* in, const void* filter,
                        int columns, HopperMaps* maps) {
  constexpr int32_t kValues = kTileRow / sizeof(T);
  const int64_t channels = static_cast<int64_t>(g.in_c) * g.groups, taps = static_cast<int64_t>(g.h.taps) * g.w.taps;
  TiledTensor of_filter{dtype, filter, 3};
  of_filter.size[0] = g.in_c, of_filter.size[1] = taps, of_filter.size[2] = static_cast<int64_t>(g.out_c) * g.groups;
  of_filter.stride[0] = g.in_c, of_filter.stride[1] = taps * g.in_c;
  of_filter.box[0] = kValues, of_filter.box[1] = 1, of_filter.box[2] = columns;
  Status status = make_tensor_map(of_filter, &maps->filter);
  if (g.is_pointwise()) {
    TiledTensor of_in{dtype, in, 2};
    of_in.size[0] = of_in.stride[0] = channels, of_in.size[1] = static_cast<int64_t>(g.batch) * g.in_h * g.in_w;
    of_in.box[0] = kValues, of_in.box[1] = kHopperRows;
    return status == Status::success ? make_tensor_map(of_in, &maps->in[0][0]) : status;
  }
  PixelTensor pixels{dtype, in, g.batch, g.in_h, g.in_w, channels, boxes};
  pixels.pixels = kHopperRows;
  for (pixels.box_h = 0; pixels.box_h < 2; ++pixels.box_h) {
    for (pixels.box_w = 0; pixels.box_w < 2; ++pixels.box_w) {
      const bool used = (pixels.box_h ? g.wider_h < g.phases_h : g.wider_h > 0) &&
                        (pixels.box_w ? g.wider_w < g.phases_w : g.wider_w > 0);
      if (used && status == Status::success) status = make_tensor_map(pixels, &maps->in[pixels.box_h][pixels.box_w]);
    }
  }
  return status;
}

template <class T, int kColumns>
Status launch_hopper_gemm_tile(const Gather& g, DType dtype, const void* in, const void* filter,
                               const EpilogueParameters<T>& epilogue, Stream stream) {
  using Tile = HopperTile<T, kColumns>;
  Target target;
  Status status = current_target(&target);
  if (status != Status::success) return status;
  HopperGrid grid;
  grid.boxes = make_pixel_boxes(g);
  grid.pointwise = g.is_pointwise();
  const int64_t row_tiles = ceil_div(g.max_rows(), Tile::kRows), column_tiles = ceil_div(g.out_c, kColumns);
  const int64_t tiles = row_tiles * column_tiles * g.groups * g.phases_h * g.phases_w;
  if (tiles > kMaxGridX) return Status::invalid_argument;
  grid.row_tiles = static_cast<int32_t>(row_tiles), grid.column_tiles = static_cast<int32_t>(column_tiles);
  grid.tiles = static_cast<int32_t>(tiles);
  HopperMaps maps;
  status = make_hopper_maps<T>(g, dtype, grid.boxes, in, filter, kColumns, &maps);
  if (status != Status::success) return status;
  const bool affine_alone = !epilogue.residual && !epilogue.relu && !epilogue.mask_in;
  const auto kernel = affine_alone ? conv2d_hopper_gemm_kernel<T, Tile, kEpilogueAffine>
                                   : conv2d_hopper_gemm_kernel<T, Tile, kEpilogueAll>;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, target.sm_count));  // persistent
  return FK_LAUNCH(kernel, dim3(blocks), dim3(kHopperThreads), Tile::kSharedBytes, stream, g, grid, maps, epilogue);
}

template <class T>
Status launch_hopper_gemm_of(const Conv2dLaunch& launch, const void* filter) {
  const Gather g = make_gather(launch.op, launch.problem);
  const auto parameters = epilogue_parameters<T>(launch.epilogue, launch.out(), g.out_c);
  const Status status = launch_mask_prepare(launch.epilogue.mask_out, g.out_numel(), parameters.vector, launch.stream);
  if (status != Status::success) return status;
  return dispatch_config<std::size(kHopperTiles)>(launch.selection.config, [&](auto config) {
    return launch_hopper_gemm_tile<T, kHopperTiles[config.value].columns>(g, launch.dtype, launch.in(), filter,
                                                                          parameters, launch.stream);
  });
}

}  // namespace freezekit
