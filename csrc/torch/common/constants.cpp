#include "torch/common/constants.h"

#include <ATen/ops/equal.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <typeinfo>
#include <unordered_set>
#include <utility>
#include <vector>

#include "torch/backends/kernel_library.h"
#include "torch/common/snapshot.h"

namespace freezekit::constants {
namespace {

struct Derived {
  Kind kind;
  int64_t stream;  // work on another stream may not have been done yet
  Snapshot snapshot;
  at::Tensor value;
  Make make;
};

struct Mark;

// Guards marks and what they hold. Both die outside the lock: a tensor that Python has seen takes the GIL to die, and
// whoever holds the GIL may be waiting for the lock. Never destroyed, since a declared tensor may die late at exit.
std::mutex& mutex = *new std::mutex;
std::unordered_set<const Mark*>& marks = *new std::unordered_set<const Mark*>;
int64_t hits = 0, misses = 0;

// What a declared tensor carries, among its hooks: it dies with the tensor, stays when `.data` is assigned, no copy
// gets it, and it takes no pointer to the tensor, which torch.utils.swap_tensors would refuse. As a hook it
// does nothing.
struct Mark final : torch::autograd::FunctionPreHook {
  std::vector<Derived> derived;

  ~Mark() override {
    const std::lock_guard<std::mutex> lock(mutex);
    marks.erase(this);
  }
  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads) override { return grads; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
};

using Hook = std::unique_ptr<torch::autograd::FunctionPreHook>;

// Where among the tensor's hooks the mark is; null if it is not declared.
Hook* hook_of(const at::Tensor& source) {
  auto* const meta = torch::autograd::impl::get_autograd_meta(source);
  if (!meta) return nullptr;
  const auto found = std::find_if(meta->hooks_.begin(), meta->hooks_.end(), [](const Hook& hook) {
    return hook && typeid(*hook) == typeid(Mark);
  });
  return found == meta->hooks_.end() ? nullptr : &*found;
}

Mark* find(const at::Tensor& source) {
  const Hook* hook = hook_of(source);
  return hook ? static_cast<Mark*>(hook->get()) : nullptr;
}

// Stream of the work that makes and reads `source`'s derived tensors; none where the cache must stay out of it: what
// is allocated while a CUDA graph is captured belongs to the graph.
std::optional<int64_t> stream_for(const at::Tensor& source) {
  if (!source.is_cuda()) return 0;
  if (!has_cuda_kernels()) return std::nullopt;
  const auto stream = c10::impl::VirtualGuardImpl(source.device().type()).getStream(source.device());
  const bool capturing = kernel_library(Backend::native).table->capturing(stream.native_handle());
  return capturing ? std::nullopt : std::make_optional(static_cast<int64_t>(stream.id()));
}

bool same(const Derived& derived, const Kind& kind, int64_t stream) {
  return derived.kind.detail == kind.detail && derived.stream == stream &&
         std::string_view(derived.kind.name) == kind.name;
}

}  // namespace

at::Tensor derived(const at::Tensor& source, Kind kind, const Make& make) {
  if (source.requires_grad() || source.is_inference()) return make(source);
  std::unique_lock<std::mutex> lock(mutex);
  if (!find(source)) return lock.unlock(), make(source);
  const auto stream = stream_for(source);
  if (!stream) return lock.unlock(), make(source);
  for (const Derived& known : find(source)->derived) {
    if (same(known, kind, *stream) && known.snapshot.matches(source)) return ++hits, known.value;
  }
  ++misses;
  const Snapshot before(source);
  lock.unlock();  // making it may call back into torch, and other threads need not wait
  at::Tensor value = make(source);
  if (value.is_inference()) return value;  // made under inference_mode: of no use to a call that records gradients
  Derived fresh{kind, *stream, before, value, make};
  lock.lock();
  if (Mark* mark = find(source); mark && before.matches(source)) {
    auto& list = mark->derived;
    const auto old = std::find_if(list.begin(), list.end(), [&](const Derived& d) { return same(d, kind, *stream); });
    if (old == list.end()) {
      list.push_back(std::move(fresh));
    } else {
      std::swap(*old, fresh);
    }
  }
  lock.unlock();  // before `fresh` dies: see `mutex`
  return value;
}

void declare(const at::Tensor& source) {
  TORCH_CHECK(!source.requires_grad(), "only a frozen tensor can be declared constant: this one requires grad");
  TORCH_CHECK(!source.is_inference(), "an inference tensor cannot be declared constant: it has no version counter");
  auto mark = std::make_unique<Mark>();
  const std::lock_guard<std::mutex> lock(mutex);
  if (find(source)) return;
  marks.insert(mark.get());
  torch::autograd::impl::materialize_autograd_meta(source)->hooks_.push_back(std::move(mark));
}

bool is_declared(const at::Tensor& source) {
  const std::lock_guard<std::mutex> lock(mutex);
  return find(source) != nullptr;
}

void withdraw(const at::Tensor& source) {
  Hook dying;
  const std::lock_guard<std::mutex> lock(mutex);
  Hook* const hook = hook_of(source);
  if (!hook) return;
  dying = std::move(*hook);
  auto& hooks = torch::autograd::impl::get_autograd_meta(source)->hooks_;
  hooks.erase(hooks.begin() + (hook - hooks.data()));
}

void invalidate(const at::Tensor& source) {
  std::vector<Derived> dying;
  const std::lock_guard<std::mutex> lock(mutex);
  if (Mark* mark = find(source)) std::swap(mark->derived, dying);
}

Usage usage() {
  const std::lock_guard<std::mutex> lock(mutex);
  Usage usage;
  usage.hits = hits, usage.misses = misses;
  for (const Mark* mark : marks) {
    ++usage.declared;
    for (const Derived& d : mark->derived) ++usage.cached, usage.bytes += static_cast<int64_t>(d.value.nbytes());
  }
  return usage;
}

std::vector<std::string> stale(const at::Tensor& source) {
  std::vector<Derived> known;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const Mark* mark = find(source)) known = mark->derived;
  }
  std::vector<std::string> names;
  for (const Derived& d : known) {
    if (d.snapshot.matches(source) && !at::equal(d.value, d.make(source))) names.emplace_back(d.kind.name);
  }
  return names;
}

}  // namespace freezekit::constants
