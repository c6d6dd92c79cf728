#include "torch/backends/kernel_library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <mutex>

// Both are null where no CUDA kernels are linked in.
extern "C" __attribute__((weak)) const freezekit::KernelTable* freezekit_kernel_table();
extern "C" __attribute__((weak)) const char* freezekit_last_error();

namespace freezekit {
namespace {

std::mutex mutex;
std::string emulator_path;
KernelLibrary emulator;

template <class Function>
Function symbol(void* handle, const char* name) {
  void* found = dlsym(handle, name);
  TORCH_CHECK(found, "the emulated kernels in ", emulator_path, " lack ", name, "; rebuild freezekit");
  return reinterpret_cast<Function>(found);
}

const KernelLibrary& load_emulator() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (emulator.table) return emulator;
  TORCH_CHECK(!emulator_path.empty(),
              "the emulated kernels are not built: they are for freezekit's tests, and `make build` in its "
              "source folder builds them");
  // RTLD_LOCAL: the CUDA build of the same functions may be in this process too.
  void* handle = dlopen(emulator_path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle, "the emulated kernels cannot be loaded: ", dlerror());
  // Of a tree whose extension alone was built again: entries of another table would be called with these arguments.
  TORCH_CHECK(symbol<size_t (*)()>(handle, "freezekit_kernel_table_bytes")() == sizeof(KernelTable),
              "the emulated kernels in ", emulator_path, " are older than this build; rebuild freezekit");
  emulator.error = symbol<const char* (*)()>(handle, "freezekit_last_error");
  emulator.table = symbol<const KernelTable* (*)()>(handle, "freezekit_kernel_table")();
  return emulator;
}

}  // namespace

std::string KernelLibrary::last_error() const {
  const char* text = error ? error() : nullptr;
  return text && *text ? std::string(": ") + text : std::string();
}

const KernelLibrary& kernel_library(Backend backend) {
  if (backend == Backend::emulated) return load_emulator();
  TORCH_CHECK(has_cuda_kernels(),
              "backend='native' needs freezekit's CUDA kernels, but this build has none: rebuild it where nvcc "
              "is on PATH or CUDA_HOME is set");
  static const KernelLibrary cuda{freezekit_kernel_table(), freezekit_last_error};
  return cuda;
}

void set_emulator_path(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  emulator_path = path;
  emulator = {};
}

bool has_cuda_kernels() { return freezekit_kernel_table != nullptr; }

}  // namespace freezekit
