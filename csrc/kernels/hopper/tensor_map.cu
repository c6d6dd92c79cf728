// Encodes tensor maps by the driver, whose functions are found at run time: the binary links no libcuda.
//
// Drivers before 13.2 set bit 85 of a map for tensors below 128 KiB as well, and CUTLASS clears it after 4.2. Blackwell reads
// it; Hopper, the only place where these maps are used, does not (CUTLASS's comment beside it), so it stays as it is.
#include <cstdio>

#include "kernels/hopper/tensor_map.h"

namespace freezekit {
namespace {

// Elements of a tensor as the driver takes them, whatever the kind of map.
struct Sizes {
  uint64_t sizes[4], strides[3];  // strides in bytes
  uint32_t ones[4] = {1, 1, 1, 1};
};

#ifdef __CUDACC__

CUtensorMapDataType type_of(DType dtype) {
  if (dtype == DType::f32) return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  return dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Tensor maps came with CUDA 12.0.
void* find_in_driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // as in launch()
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

Status report(const char* name, CUresult result) {
  if (result == CUDA_SUCCESS) return Status::success;
  char text[120];
  std::snprintf(text, sizeof text, "the driver refuses a tensor map: %s gives error %d", name,
                static_cast<int>(result));
  set_last_error(text);
  return Status::launch_failed;
}

Status report_missing(const char* name) {
  char text[120];
  std::snprintf(text, sizeof text, "the driver has no %s, which came with CUDA 12.0", name);
  set_last_error(text);
  return Status::launch_failed;
}

#else

emulator::TensorType type_of(DType dtype) {
  using Type = emulator::TensorType;
  return dtype == DType::f32 ? Type::tf32 : dtype == DType::f16 ? Type::f16 : Type::bf16;
}

Status report(bool success) { return success ? Status::success : Status::launch_failed; }

#endif

}  // namespace

Status make_tensor_map(const TiledTensor& tensor, ptx::TensorMap* map) {
  Sizes of;
  uint32_t box[3] = {};
  for (int i = 0; i < tensor.rank; ++i) {
    of.sizes[i] = static_cast<uint64_t>(tensor.size[i]), box[i] = static_cast<uint32_t>(tensor.box[i]);
    if (i > 0) of.strides[i - 1] = static_cast<uint64_t>(tensor.stride[i - 1] * size_of(tensor.dtype));
  }
#ifdef __CUDACC__
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(find_in_driver(kName));
  if (!encode) return report_missing(kName);
  return report(kName,
                encode(map, type_of(tensor.dtype), static_cast<uint32_t>(tensor.rank), const_cast<void*>(tensor.data),
                       of.sizes, of.strides, box, of.ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
#else
  return report(emulator::encode_tiled(map, type_of(tensor.dtype), static_cast<uint32_t>(tensor.rank), tensor.data,
                                       of.sizes, of.strides, box, of.ones));
#endif
}

Status make_tensor_map(const PixelTensor& tensor, ptx::TensorMap* map) {
  const PixelBox &h = tensor.boxes.h, &w = tensor.boxes.w;
  const int64_t size = size_of(tensor.dtype);
  const auto bytes = [](int64_t value) { return static_cast<uint64_t>(value); };
  const Sizes of{
      {bytes(tensor.c), bytes(tensor.w), bytes(tensor.h), bytes(tensor.n)},
      {bytes(tensor.c * size), bytes(tensor.w * tensor.c * size), bytes(tensor.h * tensor.w * tensor.c * size)}};
  // Corners are w before h, as sizes are. cuda.h words them as "{D, H, W}", and CUTLASS, which runs, passes w first.
  const int lower[2] = {w.lower, h.lower}, upper[2] = {w.upper[tensor.box_w], h.upper[tensor.box_h]};
  const uint32_t traversal[4] = {1, static_cast<uint32_t>(w.stride), static_cast<uint32_t>(h.stride), 1};
  const auto channels = static_cast<uint32_t>(128 / size), pixels = static_cast<uint32_t>(tensor.pixels);
#ifdef __CUDACC__
  constexpr const char* kName = "cuTensorMapEncodeIm2col";
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(find_in_driver(kName));
  if (!encode) return report_missing(kName);
  return report(
      kName, encode(map, type_of(tensor.dtype), 4, const_cast<void*>(tensor.data), of.sizes, of.strides, lower, upper,
                    channels, pixels, traversal, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
#else
  return report(emulator::encode_im2col(map, type_of(tensor.dtype), 4, tensor.data, of.sizes, of.strides, lower, upper,
                                        channels, pixels, traversal));
#endif
}

}  // namespace freezekit
