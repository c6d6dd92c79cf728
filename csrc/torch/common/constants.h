// The constant cache: what is made from a weight that was declared constant is made once, not at every call.
//
// A weight is declared by `freeze` or `fuse`, never by its having requires_grad = False alone: writes through `.data` or
// numpy change neither version nor pointer, so a cached copy could be silently stale. Every other change is seen: an
// entry is served only for the same tensor, the same storage, the same version, and while no gradient is asked for.
// The tensor carries a mark that torch neither copies nor saves: nothing reaches state_dict, pickle or deepcopy.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

namespace freezekit::constants {

// What was made from the weight; `detail` tells apart what one kind has several of (a dtype, a kernel's layout).
struct Kind {
  const char* name;
  int64_t detail;
};

// Captures nothing of the source itself: a cached entry must not keep it alive.
using Make = std::function<at::Tensor(const at::Tensor& source)>;

// `source` as `make(source)` gives it: from the cache where source is declared constant, fresh elsewhere.
at::Tensor derived(const at::Tensor& source, Kind kind, const Make& make);

// Declaring twice is declaring once.
void declare(const at::Tensor& source);
bool is_declared(const at::Tensor& source);
void withdraw(const at::Tensor& source);

// Drops what was made from `source`, which stays declared; the next call makes it again.
void invalidate(const at::Tensor& source);

struct Usage {
  int64_t declared = 0, cached = 0, bytes = 0, hits = 0, misses = 0;
};
Usage usage();

// Names of the cached kinds of `source` that differ from what making them again gives: stale through a write that
// cannot be seen. For tests and debugging; costs one making each.
std::vector<std::string> stale(const at::Tensor& source);

}  // namespace freezekit::constants
