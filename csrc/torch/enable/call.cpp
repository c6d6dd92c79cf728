#include "torch/enable/call.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <atomic>

#include "torch/backends/proof.h"

namespace freezekit::enable {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

std::atomic<IsCompiled> is_compiled_ = nullptr;
thread_local bool is_watched = false;

const DispatchKeySet kPlain = proof::kPlain;
// A tensor with __torch_dispatch__.
const DispatchKeySet kPython = DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});

bool is_only(const Tensor& tensor, DispatchKeySet allowed) { return (tensor.key_set() | allowed) == allowed; }

bool has_kernels(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble) &&
         !has_tangent(tensor);
}

}  // namespace

void set_is_compiled(IsCompiled predicate) { is_compiled_ = predicate; }

void set_watched(bool watched) { is_watched = watched; }

namespace detail {

bool is_plain(const Tensor& tensor) {
  if (!tensor.defined() || (is_only(tensor, kPlain) && has_kernels(tensor))) return true;
  return is_watched && is_compiled(tensor);  // freezekit runs models on stand-ins for tensors
}

bool is_compiled(const Tensor& tensor) {
  return tensor.key_set().has(DispatchKey::Python) && is_only(tensor, kPlain | kPython) && has_kernels(tensor) &&
         is_compiled_.load()(tensor);
}

bool is_watched_here() { return is_watched; }

bool has_modes() { return c10::impl::TorchDispatchModeTLS::any_modes_set() && !is_watched; }

}  // namespace detail
}  // namespace freezekit::enable
