#include "torch/common/shape_only.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <mutex>

#if defined(__unix__)
#include <sys/mman.h>
#endif

namespace freezekit {
namespace {

// An address range that can be read and takes no memory, for all that want one; null where the system has none. Ranges
// that were outgrown stay: tensors may still point at them.
void* readable_zeros([[maybe_unused]] size_t bytes) {
#if defined(__unix__) && defined(MAP_ANONYMOUS) && defined(MAP_NORESERVE)
  static std::mutex lock;
  static void* range = nullptr;
  static size_t length = 0;
  const std::lock_guard guard(lock);
  if (length < bytes) {
    const size_t wanted = std::max({bytes, 2 * length, size_t{64} << 20});
    void* const mapped = mmap(nullptr, wanted, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    range = mapped, length = wanted;
  }
  return range;
#else
  return nullptr;
#endif
}

// Of tensors that a transform, trace or subclass looks on at.
constexpr c10::DispatchKeySet watchers({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                        c10::DispatchKey::Batched, c10::DispatchKey::Python,
                                        c10::DispatchKey::Functionalize});

}  // namespace

bool is_plain_on_cpu(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(watchers) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

Tensor shape_only(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format) {
  const auto numbers = c10::asIntArrayRefSlowOpt(size);
  if (numbers && is_plain_on_cpu(like)) {
    const int64_t numel = c10::multiply_integers(*numbers);
    void* const zeros = numel > 0 ? readable_zeros(numel * like.element_size()) : nullptr;
    if (zeros) {
      Tensor shape = at::from_blob(zeros, *numbers, like.options());
      shape.unsafeGetTensorImpl()->empty_tensor_restride(format);
      return shape;
    }
  }
  return at::empty_symint(size, like.options(), format);
}

Tensor without_data(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format) {
  if (like.is_meta() || like.key_set().has_any(watchers) || c10::impl::TorchDispatchModeTLS::any_modes_set()) {
    return at::empty({1}, like.options()).expand_symint(size);  // what looks on can follow it
  }
  const auto numbers = C10_AS_INTARRAYREF_SLOW(size);
  const Tensor shape = at::empty(numbers, like.options().device(at::kMeta), format);
  const Tensor result = at::empty({0}, like.options());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(numbers, shape.strides());
  return result;
}

}  // namespace freezekit
