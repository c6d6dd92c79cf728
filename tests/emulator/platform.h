// What the drivers need of the place where kernels run: the emulator, or under FK_ON_DEVICE a GPU. There the kernels come
// from the build's own CUDA objects, and a driver links them without torch, which is what compute-sanitizer wants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef FK_ON_DEVICE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#else
#include "emulator/half_types.h"

extern "C" void freezekit_emulator_set_seed(unsigned);
extern "C" bool freezekit_emulator_set_cp_async(const char*);
extern "C" uint64_t freezekit_emulator_counter(const char*);
#endif

namespace driver {

#ifdef FK_ON_DEVICE

// Whether memory is filled with NaN before a kernel sees it; initcheck wants to see who reads what nobody wrote.
inline bool poisoned = true;

// A schedule is the hardware's own; the word that says when copies land says here what memory holds to begin with.
inline bool set_schedule(unsigned, const char* memory) {
  poisoned = std::strcmp(memory, "unwritten") != 0;
  return !poisoned || std::strcmp(memory, "poisoned") == 0;
}

inline unsigned long long bank_conflicts() { return 0; }  // not counted by hardware that nobody profiles

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(3);
}

// A block of device memory of the exact size, and its copy on the host.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), host_(std::malloc(bytes)) {
    must(cudaMalloc(&device_, bytes ? bytes : 1), "cudaMalloc");
    if (poisoned) must(cudaMemset(device_, 0xff, bytes), "cudaMemset");
  }
  ~Memory() {
    std::free(host_);
    must(cudaFree(device_), "cudaFree");
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* of_kernels() const { return device_; }
  void* of_host() const { return host_; }
  void to_kernels() const { must(cudaMemcpy(device_, host_, bytes_, cudaMemcpyHostToDevice), "copy to the device"); }
  void to_host() const { must(cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost), "copy from the device"); }

 private:
  size_t bytes_;
  void* host_;
  void* device_ = nullptr;
};

// Waits for the kernels; a fault shows here.
inline void finish_kernels() { must(cudaDeviceSynchronize(), "launch failed"); }

#else

inline bool set_schedule(unsigned seed, const char* cp_async) {
  freezekit_emulator_set_seed(seed);
  return freezekit_emulator_set_cp_async(cp_async);
}

inline unsigned long long bank_conflicts() { return freezekit_emulator_counter("ldmatrix_conflicts"); }

// A heap block of the exact size, so that a sanitizer sees the first byte beyond it, full of NaN to begin with.
class Memory {
 public:
  explicit Memory(size_t bytes) : host_(std::malloc(bytes)) { std::memset(host_, 0xff, bytes); }
  ~Memory() { std::free(host_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* of_kernels() const { return host_; }
  void* of_host() const { return host_; }
  void to_kernels() const {}
  void to_host() const {}

 private:
  void* host_;
};

inline void finish_kernels() {}

#endif

}  // namespace driver
