// Tensors that interfaces of ATen's want for their size, dtype and layout, and whose values they do not need. Both are
// of `size`, dense in `format` (4 axes for channels_last), with dtype and device of `like`.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/common/operators.h"

namespace freezekit {

// Whether a tensor is data on a CPU and nothing else: its values are in its memory, and no transform, trace, subclass or
// mode sees what is done with them.
bool is_plain_on_cpu(const Tensor&);

// For operators that touch the values all the same. Beside plain tensors on a CPU it takes no memory, and reads as
// zeros. The second is told that `like` is one.
Tensor shape_only(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format);
Tensor shape_only_beside_plain(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format);

// For operators that read size and layout alone, on any device: it takes no memory, and reading a value of it throws.
// Beside tensors that are traced or transformed, it is one element seen many times, whose layout says nothing.
Tensor without_data(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format);

}  // namespace freezekit
