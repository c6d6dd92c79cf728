// A node of freezekit's that stands in the place of torch's own, which is still there: who looks for torch's finds it.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>

#include "torch/autograd/node.h"

namespace freezekit {

// The last one of this thread, which alone changes it.
struct Instead {
  const torch::autograd::Node* own = nullptr;
  std::weak_ptr<const AnyNodePtr> torch_s;
};
inline thread_local Instead instead;

// For as long as `node` is there.
inline torch::autograd::Node* torch_s_node(torch::autograd::Node* node) {
  if (!node || node != instead.own) return node;
  const auto torch_s = instead.torch_s.lock();  // another node may have the address by now
  return torch_s && *torch_s ? torch_s->get() : node;
}

}  // namespace freezekit
