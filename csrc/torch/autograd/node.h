// autograd's Node is held by shared_ptr up to torch 2.12 and by intrusive_ptr from 2.13 on.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <utility>

namespace freezekit {

// The pointer to a Node that this torch uses, read from the type of an edge's function.
using AnyNodePtr = decltype(torch::autograd::Edge::function);

template <class T, class Pointer>
struct RebindPointer;
template <class T, class U>
struct RebindPointer<T, std::shared_ptr<U>> {
  using type = std::shared_ptr<T>;
  using weak = std::weak_ptr<T>;
  template <class... Args>
  static type make(Args&&... args) {
    // deleteNode walks the graph without recursion: a plain delete overflows the stack on a deep one.
    // Found by argument-dependent lookup: torch versions that need no such function do not declare it.
    return type(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  }
  static std::shared_ptr<U> of(U& node) { return node.shared_from_this(); }
};
template <class T, class U>
struct RebindPointer<T, c10::intrusive_ptr<U>> {
  using type = c10::intrusive_ptr<T>;
  using weak = c10::weak_intrusive_ptr<T>;
  template <class... Args>
  static type make(Args&&... args) {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
  static c10::intrusive_ptr<U> of(U& node) { return c10::intrusive_ptr<U>::reclaim_copy(&node); }
};

template <class T>
using NodePtr = typename RebindPointer<T, AnyNodePtr>::type;
using WeakNodePtr = RebindPointer<torch::autograd::Node, AnyNodePtr>::weak;

template <class T, class... Args>
NodePtr<T> make_node(Args&&... args) {
  return RebindPointer<T, AnyNodePtr>::make(std::forward<Args>(args)...);
}

// The pointer to a node that pointers already own.
template <class Node>
AnyNodePtr pointer_to(Node& node) {
  return RebindPointer<Node, AnyNodePtr>::of(node);
}

}  // namespace freezekit
