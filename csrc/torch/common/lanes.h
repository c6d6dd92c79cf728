// Floats in a vector, by what torch itself uses of this processor; 0 where that is neither AVX2 nor AVX-512.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "cpu/simd.h"

namespace freezekit {

inline int lanes() {
  static const int found = [] {
    const std::string uses = at::get_cpu_capability();
    if (!cpu::kHasClones) return 0;
    return uses == "AVX512" ? 16 : uses == "AVX2" ? 8 : 0;
  }();
  return found;
}

}  // namespace freezekit
