// What freezekit's own kernels have launched since the log was switched on; for tests and for reports.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "torch/common/operators.h"

namespace freezekit::launch_log {

struct Record {
  const char* op;  // static storage, as is `kernel`
  const char* kernel;
  Backend backend;
  std::vector<std::pair<const char*, std::vector<int64_t>>> sizes;  // of the operator's tensors, by name
  int64_t bytes = 0;  // of the tensors that a layer's kernel reads and writes; 0 for a convolution's
};

bool is_enabled();
void set_enabled(bool);
void add(Record);
// Empties the log.
std::vector<Record> take();

}  // namespace freezekit::launch_log
