#include "torch/enable/enable.h"

#include <array>
#include <atomic>
#include <memory>

#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

// Meta for a look at a model without data, as explain takes it.
constexpr std::array<c10::DispatchKey, 3> kKeys = {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                                                   c10::DispatchKey::AutogradMeta};

// A registration lasts as long as its Library.
std::array<std::unique_ptr<torch::Library>, kKeys.size()> registrations;
std::atomic<bool> is_enabled_ = false;

}  // namespace

std::vector<std::string> enable() {
  std::array<torch::Library*, kKeys.size()> libraries;
  for (size_t i = 0; i < kKeys.size(); ++i) {
    registrations[i] = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", kKeys[i], __FILE__, __LINE__);
    libraries[i] = registrations[i].get();
  }
  std::vector<std::string> others = AnyStandIn::take_over(libraries, kKeys);
  is_enabled_ = true;
  return others;
}

void disable() {
  is_enabled_ = false;
  for (auto& registration : registrations) registration.reset();
}

bool is_enabled() { return is_enabled_.load(std::memory_order_relaxed); }

std::vector<std::string> operators() { return AnyStandIn::names(); }

}  // namespace freezekit::enable
