#include "torch/enable/enable.h"

#include <array>
#include <memory>

#include "torch/enable/operator.h"

namespace freezekit::enable {
namespace {

// Meta for a look at a model without data, as explain takes it.
constexpr std::array<c10::DispatchKey, 3> kKeys = {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                                                   c10::DispatchKey::AutogradMeta};

// A registration lasts as long as its Library.
std::array<std::unique_ptr<torch::Library>, kKeys.size()> registrations;

}  // namespace

std::vector<std::string> enable() {
  std::array<torch::Library*, kKeys.size()> libraries;
  for (size_t i = 0; i < kKeys.size(); ++i) {
    registrations[i] = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", kKeys[i], __FILE__, __LINE__);
    libraries[i] = registrations[i].get();
  }
  return AnyStandIn::take_over(libraries, kKeys);
}

void disable() {
  for (auto& registration : registrations) registration.reset();
}

std::vector<std::string> operators() { return AnyStandIn::names(); }

}  // namespace freezekit::enable
