// What kernels need of CUDA beyond the language, for two compilers: nvcc (a GPU) and g++ (csrc/emulator, a CPU).
//
//   FK_DEVICE                          a device function, inlined
//   FK_SHARED(float, tile, [8][32]);   a static shared array, 16-byte aligned
//   FK_DYNAMIC_SHARED(bytes);          the dynamic shared memory as unsigned char*, 128-byte aligned
//   FK_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)   a Status
//   load_global(p), store_global(p, v) one access of sizeof(T) bytes, counted under emulation
//   cast<To>(v)                        between float, double, f16, bf16, rounding to nearest even
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/api.h"
#include "kernels/last_error.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FK_DEVICE __device__ __forceinline__
#define FK_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define FK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#else

#include <tuple>
#include <type_traits>

#include "emulator/cuda.h"

#define FK_DEVICE inline
#define FK_SHARED(type, name, ...)       \
  static char name##_key;                \
  using name##_array = type __VA_ARGS__; \
  name##_array& name =                   \
      *static_cast<name##_array*>(::freezekit::emulator::static_shared(&name##_key, sizeof(name##_array)))
#define FK_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(::freezekit::emulator::dynamic_shared())

#endif

// The commas of a template's arguments pass through: FK_LAUNCH(kernel<float, 4>, grid, ...).
#define FK_LAUNCH(...) ::freezekit::launch(__VA_ARGS__)

#define FK_EXPORT __attribute__((visibility("default")))

namespace freezekit {

using f16 = __half;
using bf16 = __nv_bfloat16;

#ifdef __CUDACC__

// More dynamic shared memory than this must be asked for, kernel by kernel (CUDA C++ Programming Guide, compute
// capability 8.x).
constexpr size_t kDynamicSharedDefault = 48 * 1024;

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, Stream stream,
              Arguments... arguments) {
  const void* const entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (dynamic_shared > kDynamicSharedDefault) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
  }
  if (error == cudaSuccess) {
    // As <<<>>> does, but with the launch's own result: the thread's last error may be an earlier call's, of anybody.
    const auto run = [&](Parameters... values) {
      void* pointers[] = {&values...};
      return cudaLaunchKernel(entry, grid, block, pointers, dynamic_shared, static_cast<cudaStream_t>(stream));
    };
    error = run(static_cast<Parameters>(arguments)...);
  }
  if (error == cudaSuccess) return Status::success;
  set_last_error(cudaGetErrorString(error));
  static_cast<void>(cudaGetLastError());  // else the next launch, torch's perhaps, would be blamed for it
  return Status::launch_failed;
}

template <class T>
FK_DEVICE T load_global(const T* p) {
  return *p;
}

template <class T>
FK_DEVICE void store_global(T* p, const T& value) {
  *p = value;
}

#else

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, Stream,
              Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto body = [](const void* c) {
    const Call& of_thread = *static_cast<const Call*>(c);
    std::apply(of_thread.kernel, of_thread.arguments);
  };
  return emulator::run(body, &call, grid, block, dynamic_shared) ? Status::success : Status::launch_failed;
}

template <class T>
void check_global_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) {
    emulator::fail("%zu bytes accessed at an address that is not a multiple of it", sizeof(T));
  }
}

template <class T>
T load_global(const T* p) {
  check_global_alignment(p);
  emulator::count_global_read(sizeof(T));
  return *p;
}

template <class T>
void store_global(T* p, const T& value) {
  check_global_alignment(p);
  emulator::count_global_write(sizeof(T));
  *p = value;
}

#endif

template <class To, class From>
FK_DEVICE To cast(From value) {
  return static_cast<To>(value);
}
template <>
FK_DEVICE float cast<float, f16>(f16 value) {
  return __half2float(value);
}
template <>
FK_DEVICE float cast<float, bf16>(bf16 value) {
  return __bfloat162float(value);
}
template <>
FK_DEVICE f16 cast<f16, float>(float value) {
  return __float2half_rn(value);
}
template <>
FK_DEVICE bf16 cast<bf16, float>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace freezekit
