// Tensor maps, which tell the tensor memory accelerator what a tensor is; made on the host, passed as kernel parameters.
//
// All have the 128-byte swizzle and zeros outside of the tensor. Fails where the driver refuses: the address is off 16
// bytes, a stride is not a multiple of 16 bytes ...; core/pixel_box.h has the limits of im2col.
#pragma once

#include "core/pixel_box.h"
#include "kernels/hopper/ptx_sm90.h"

namespace freezekit {

// Rows of 128 bytes: size[0] elements are next to each other, the others stride[i - 1] elements apart.
struct TiledTensor {
  DType dtype = DType::bf16;
  const void* data = nullptr;
  int rank = 2;
  int64_t size[3] = {}, stride[2] = {};
  int32_t box[3] = {};  // box[0] elements are 128 bytes
};

// N x H x W x C; a copy brings `pixels` pixels of 128 bytes of channels.
struct PixelTensor {
  DType dtype = DType::bf16;
  const void* data = nullptr;
  int64_t n = 0, h = 0, w = 0, c = 0;
  PixelBoxes boxes;
  int32_t box_h = 0, box_w = 0;  // which of the two
  int32_t pixels = 0;
};

// float rounds to tf32, to nearest even, on its way.
Status make_tensor_map(const TiledTensor&, ptx::TensorMap*);
Status make_tensor_map(const PixelTensor&, ptx::TensorMap*);

}  // namespace freezekit
