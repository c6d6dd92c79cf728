// What becomes of CUDA's errors around a launch, by csrc/kernels/device.h as nvcc sees it, with a runtime that fails as told.
//
// A line per case: the status, freezekit's text, the thread's last error afterwards, whether the kernel ran.
#define __CUDACC__

#include <cuda_runtime.h>  // first, as nvcc does it

#include <cstdio>

#include "kernels/device.h"

namespace {

cudaError_t last = 0, of_attribute = 0, of_launch = 0;
int ran = 0;
double seen = 0;

cudaError_t ended(cudaError_t error) {
  if (error != 0) last = error;
  return error;
}

void kernel(const int* a, double b) { ran += *a, seen = b; }

void show(const char* name, cudaError_t before, cudaError_t attribute, cudaError_t launch, size_t shared) {
  last = before, of_attribute = attribute, of_launch = launch, ran = 0;
  freezekit::set_last_error("");
  const int one = 1;
  const freezekit::Status status = FK_LAUNCH(kernel, dim3(1), dim3(1), shared, nullptr, &one, 2.5f);
  std::printf("%s: %d '%s' %d %d\n", name, static_cast<int>(status), freezekit_last_error(), last, ran);
}

}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = 0;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  static char text[16];
  std::snprintf(text, sizeof text, "error %d", error);
  return text;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return ended(of_attribute); }
cudaError_t cudaLaunchKernel(const void* entry, dim3, dim3, void** arguments, size_t, cudaStream_t) {
  if (of_launch == 0) {
    reinterpret_cast<void (*)(const int*, double)>(const_cast<void*>(entry))(*static_cast<const int**>(arguments[0]),
                                                                             *static_cast<double*>(arguments[1]));
  }
  return ended(of_launch);
}

int main() {
  show("good", 0, 0, 0, 0);
  show("large", 0, 0, 0, 1 << 16);
  show("another's error before", 7, 0, 0, 0);
  show("refused", 0, 0, 9, 0);
  show("refused after another's error", 7, 0, 9, 0);
  show("no such memory", 0, 1, 0, 1 << 16);
  std::printf("%g\n", seen);
}
