// The tensor maps that freezekit's launchers ask the driver for, by a driver that only takes notes: what the emulator never
// sees, since it has functions of its own in the driver's place.
#include "tests/truth/driver_notes.h"
//
#include "kernels/hopper/tensor_map.cu"  // as one file: nvcc takes seconds for each
#include "kernels/last_error.cu"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

// tensor_map.cu asks the runtime for the driver's functions.
extern "C" cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                                  unsigned long long,
                                                                  cudaDriverEntryPointQueryResult* found) {
  const bool tiled = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function =
      tiled ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : reinterpret_cast<void*>(cuTensorMapEncodeIm2col);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The arguments for a map of the emulator: pixels of an NHWC tensor, or rows of a matrix or filter. Whether that succeeded.
EXPORT int driver_map(const truth::Map* of, truth::Map* out) {
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  constexpr intptr_t kTensor = 1 << 20;  // where the tensor begins: nobody reads it
  const DType dtype = kTypes[of->type];
  const auto* const data = reinterpret_cast<const void*>(kTensor + of->address);
  const int64_t size = size_of(dtype);
  CUtensorMap map;
  Status status;
  if (of->im2col) {
    PixelTensor tensor{dtype, data, of->sizes[3], of->sizes[2], of->sizes[1], of->sizes[0]};
    PixelBox* const boxes[2] = {&tensor.boxes.w, &tensor.boxes.h};
    for (int i = 0; i < 2; ++i) {
      boxes[i]->lower = static_cast<int32_t>(of->lower[i]), boxes[i]->upper[0] = static_cast<int32_t>(of->upper[i]);
      boxes[i]->stride = static_cast<int32_t>(of->traversal[i + 1]);
    }
    tensor.pixels = static_cast<int32_t>(of->pixels);
    status = make_tensor_map(tensor, &map);
  } else {
    TiledTensor tensor{dtype, data, static_cast<int>(of->rank)};
    for (int i = 0; i < tensor.rank; ++i) {
      tensor.size[i] = of->sizes[i], tensor.box[i] = static_cast<int32_t>(of->box[i]);
      if (i > 0) tensor.stride[i - 1] = of->strides[i - 1] / size;
    }
    status = make_tensor_map(tensor, &map);
  }
  *out = truth::noted;
  out->address -= kTensor;
  return status == Status::success;
}
