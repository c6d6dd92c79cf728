// The two builds of the kernels: the CUDA one is linked in, the emulated one is a shared library loaded when first used.
#pragma once

#include <string>

#include "kernels/api.h"
#include "torch/common/operators.h"

namespace freezekit {

struct KernelLibrary {
  const KernelTable* table = nullptr;
  const char* (*error)() = nullptr;

  // ": what went wrong", or nothing.
  std::string last_error() const;
};

// The library of Backend::native or Backend::emulated; throws where this build has none, saying how to get it.
const KernelLibrary& kernel_library(Backend);

void set_emulator_path(const std::string& path);
bool has_cuda_kernels();

}  // namespace freezekit
