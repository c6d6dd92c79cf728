// Calls for which torch's dispatcher would only find a kernel: they may call its function directly. Beside a small layer
// each way through the dispatcher counts.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace freezekit {

// Whether a call on these tensors meets autograd at most, then a CPU's kernel. What else could see it has a dispatch key,
// in a tensor or in the thread: subclasses, modes, tracers, transforms, autocast. The profiler has callbacks.
template <class... Tensors>
bool is_unseen(const Tensors&... tensors) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet met(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto keys = ((tensors.key_set() | ...) | local.included_) - local.excluded_;
  return (keys | met) == met && !at::hasCallbacks();
}

// Whether a tensor has a forward-mode gradient. Torch's function for that counts a reference up and down.
inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }

// Whether torch's kernel on the autograd key would do no more than call the one below: no gradient is recorded, of
// either kind.
template <class... Tensors>
bool is_unrecorded(const Tensors&... tensors) {
  return !torch::autograd::compute_requires_grad(tensors...) && (!has_tangent(tensors) && ...);
}

// Guards below autograd exclude its functionality, which belongs to no backend.
inline bool is_below_autograd() {
  return c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality);
}

// Whether a call on these tensors meets a CPU's kernel alone. Kernels that another library has put in the place of
// freezekit's own are stepped past.
template <class... Tensors>
bool reaches_kernel(const Tensors&... tensors) {
  return is_unseen(tensors...) && (is_below_autograd() || is_unrecorded(tensors...));
}

// at::empty_strided and at::empty on the device of `tensor`.
inline at::Tensor empty_beside(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                               at::ScalarType dtype) {
  if (is_unseen(tensor)) {
    return at::Tensor(
        at::detail::empty_strided_cpu(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), dtype));
  }
  return at::empty_strided_symint(size, stride, tensor.options().dtype(dtype));
}
inline at::Tensor empty_beside(const at::Tensor& tensor, c10::SymIntArrayRef size, at::MemoryFormat format,
                               at::ScalarType dtype) {
  if (is_unseen(tensor)) {
    return at::Tensor(at::detail::empty_cpu(C10_AS_INTARRAYREF_SLOW(size), dtype, /*pin_memory=*/false, format));
  }
  return at::empty_symint(size, tensor.options().dtype(dtype), format);
}

}  // namespace freezekit
