// Tensor maps and bulk copies as both sides note them; records.py has the same structures for Python.
#pragma once

#include <cstdint>

namespace truth {

// The arguments of cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col; dimension 0 is the innermost, corners are w and h. Of a
// driver's map `type` is as the driver numbers it, of the emulator's as Problem has it.
struct Map {
  int64_t im2col = 0, type = 0, rank = 0;
  int64_t sizes[4] = {}, strides[3] = {}, traversal[4] = {};       // strides in bytes
  int64_t box[4] = {};                                             // tiled
  int64_t lower[2] = {}, upper[2] = {}, channels = 0, pixels = 0;  // im2col
  int64_t swizzle = 0, interleave = 0, fill = 0;
  int64_t address = 0;  // bytes from the start of the tensor that was given
};

// One bulk copy: its map, the tile and step of the reduction that it is for, where it begins, and where in a stage of shared
// memory it goes. Kernels are noted in the order of their copies, each block's together: `tile` is the block, `to` an address
// in shared memory, and the step is left to whoever knows the stages.
struct Copy {
  int32_t map = 0, tile = 0, step = 0, to = 0;
  int32_t at[4] = {};      // innermost first: channel, w, h, image of an im2col copy
  int32_t offset[2] = {};  // w, h
};

// type: 0 bf16, 1 f16, 2 tf32. Padding may differ between the sides for CUTLASS alone.
struct Problem {
  int32_t op, type, n, h, w, c, k, r, s, pad_h, pad_w, far_pad_h, far_pad_w, stride_h, stride_w, dilation_h, dilation_w;
};

}  // namespace truth
