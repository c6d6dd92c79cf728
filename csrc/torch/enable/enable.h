// The switch: freezekit's kernels on torch's own operators, for the process.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace freezekit::enable {

// Whether a tensor of a Python class stands for another one while torch.compile, or freezekit, traces.
using IsCompiled = bool (*)(const at::Tensor&);
void set_is_compiled(IsCompiled);

// Registers the kernels; returns the operators that another library has taken, which are left to it.
std::vector<std::string> enable();
// Takes them out again: every dispatch table is what it was.
void disable();
bool is_enabled();

// Whether the dispatch modes of this thread are freezekit's own, which want to see what freezekit does.
void set_watched(bool watched);

// The operators that have a stand-in.
std::vector<std::string> operators();

}  // namespace freezekit::enable
