// A tensor that an interface of ATen's wants for its size, dtype and layout, and never reads.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/operators.h"

namespace freezekit {

// Whether a tensor on the CPU is data and nothing else: no transform, trace or subclass looks at what is done with it.
bool is_plain_on_cpu(const Tensor&);

// Of `size`, dense in `format` (4 axes for channels_last), with dtype and device of `like`. Beside plain tensors on a CPU
// it takes no memory, and reads as zeros.
Tensor shape_only(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format);

}  // namespace freezekit
