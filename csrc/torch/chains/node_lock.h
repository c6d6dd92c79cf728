// A node of a graph that another thread may be going backward through: what it saved is read, and replaced, under its lock.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>

#include <mutex>

namespace freezekit::chain {

// Raises where the node is busy: waiting could be for ever, and without a recipe all is kept as in torch. A node that this
// thread is running is locked already.
class NodeLock {
 public:
  explicit NodeLock(const torch::autograd::Node& node) {
    if (&node == torch::autograd::get_current_node().get()) return;
    lock_ = std::unique_lock(Access::mutex_of(node), std::try_to_lock);
    TORCH_CHECK(lock_.owns_lock(), node.name(), " is being run by another thread");
  }

 private:
  struct Access : torch::autograd::Node {
    static std::mutex& mutex_of(const Node& node) { return const_cast<Node&>(node).*(&Access::mutex_); }
  };

  std::unique_lock<std::mutex> lock_;
};

}  // namespace freezekit::chain
