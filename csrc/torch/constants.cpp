#include "torch/constants.h"

#include <ATen/ops/equal.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch/kernel_library.h"
#include "torch/snapshot.h"

namespace freezekit::constants {
namespace {

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct Derived {
  Kind kind;
  int64_t stream;  // work on another stream may not have been done yet
  Snapshot snapshot;
  at::Tensor value;
  Make make;
};

// Entries and their tensors die outside the lock: a tensor that Python has seen takes the GIL to die, and whoever holds
// the GIL may be waiting for the lock.
struct Entry {
  WeakTensor source;
  std::vector<Derived> derived;
};

std::mutex mutex;
std::unordered_map<c10::TensorImpl*, Entry> entries;
int64_t hits = 0, misses = 0;

Entry* find(const at::Tensor& source) {
  const auto found = entries.find(source.unsafeGetTensorImpl());
  return found == entries.end() || found->second.source.expired() ? nullptr : &found->second;
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
  if (Entry* entry = find(source); entry && before.matches(source)) {
    auto& list = entry->derived;
    const auto old = std::find_if(list.begin(), list.end(), [&](const Derived& d) { return same(d, kind, *stream); });
    if (old == list.end()) {
      list.push_back(std::move(fresh));
    } else {
      std::swap(*old, fresh);
    }
  }
  lock.unlock();  // before `fresh` dies: see Entry
  return value;
}

uintptr_t declare(const at::Tensor& source) {
  TORCH_CHECK(!source.requires_grad(), "only a frozen tensor can be declared constant: this one requires grad");
  TORCH_CHECK(!source.is_inference(), "an inference tensor cannot be declared constant: it has no version counter");
  Entry entry{WeakTensor(source.getIntrusivePtr()), {}};
  const std::lock_guard<std::mutex> lock(mutex);
  c10::TensorImpl* key = source.unsafeGetTensorImpl();
  if (!find(source)) std::swap(entries.insert_or_assign(key, Entry{entry.source, {}}).first->second, entry);
  return reinterpret_cast<uintptr_t>(key);
}

bool is_declared(const at::Tensor& source) {
  const std::lock_guard<std::mutex> lock(mutex);
  return find(source) != nullptr;
}

void forget(uintptr_t key) {
  decltype(entries)::node_type dying;
  const std::lock_guard<std::mutex> lock(mutex);
  dying = entries.extract(reinterpret_cast<c10::TensorImpl*>(key));
}

void withdraw(const at::Tensor& source) { forget(reinterpret_cast<uintptr_t>(source.unsafeGetTensorImpl())); }

void invalidate(const at::Tensor& source) {
  std::vector<Derived> dying;
  const std::lock_guard<std::mutex> lock(mutex);
  if (Entry* entry = find(source)) std::swap(entry->derived, dying);
}

Usage usage() {
  const std::lock_guard<std::mutex> lock(mutex);
  Usage usage;
  usage.hits = hits, usage.misses = misses;
  for (const auto& [key, entry] : entries) {
    if (entry.source.expired()) continue;
    ++usage.declared;
    for (const Derived& d : entry.derived) ++usage.cached, usage.bytes += static_cast<int64_t>(d.value.nbytes());
  }
  return usage;
}

std::vector<std::string> stale(const at::Tensor& source) {
  std::vector<Derived> known;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const Entry* entry = find(source)) known = entry->derived;
  }
  std::vector<std::string> names;
  for (const Derived& d : known) {
    if (d.snapshot.matches(source) && !at::equal(d.value, d.make(source))) names.emplace_back(d.kind.name);
  }
  return names;
}

}  // namespace freezekit::constants
