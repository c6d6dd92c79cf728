#include "torch/backends/launch_log.h"

#include <atomic>
#include <mutex>

namespace freezekit::launch_log {
namespace {

std::atomic<bool> enabled{false};
std::mutex mutex;
std::vector<Record> records;

}  // namespace

bool is_enabled() { return enabled.load(std::memory_order_relaxed); }

void set_enabled(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  enabled = on;
  if (!on) records.clear();
}

void add(Record record) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (enabled) records.push_back(std::move(record));
}

std::vector<Record> take() {
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(records, {});
}

}  // namespace freezekit::launch_log
