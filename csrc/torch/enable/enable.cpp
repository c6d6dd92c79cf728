#include "torch/enable/enable.h"

#include <algorithm>
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
  std::vector<std::string> others;
  for (size_t i = 0; i < kKeys.size(); ++i) {
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", kKeys[i], __FILE__, __LINE__);
    for (auto& name : AnyOperator::take_over(*library, kKeys[i])) {
      if (std::find(others.begin(), others.end(), name) == others.end()) others.push_back(std::move(name));
    }
    registrations[i] = std::move(library);
  }
  return others;
}

void disable() {
  for (auto& registration : registrations) registration.reset();
}

std::vector<std::string> operators() { return AnyOperator::names(); }

}  // namespace freezekit::enable
