#include "torch/common/shape_only.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>

#if defined(__unix__)
#include <sys/mman.h>
#endif

#include "torch/common/unseen.h"

namespace freezekit {
namespace {

// An address range that can be read and takes no memory, for all that want one; nothing where the system has none. Ranges
// that were outgrown stay mapped: tensors may still point at them.
std::optional<c10::Storage> readable_zeros([[maybe_unused]] size_t bytes) {
#if defined(__unix__) && defined(MAP_ANONYMOUS) && defined(MAP_NORESERVE)
  static std::atomic<const c10::Storage*> range =
      nullptr;  // never freed: autograd's threads may ask while the process ends
  const c10::Storage* known = range.load(std::memory_order_acquire);
  if (known && known->nbytes() >= bytes) return *known;
  static std::mutex lock;
  const std::lock_guard guard(lock);
  known = range.load(std::memory_order_relaxed);
  const size_t length = known ? known->nbytes() : 0;
  if (length < bytes) {
    const size_t wanted = std::max({bytes, 2 * length, size_t{64} << 20});
    void* const mapped = mmap(nullptr, wanted, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return std::nullopt;
    known = new c10::Storage(c10::Storage::use_byte_size_t(), wanted, at::DataPtr(mapped, at::kCPU));
    range.store(known, std::memory_order_release);
  }
  return *known;
#else
  return std::nullopt;
#endif
}

Tensor resized(const Tensor& tensor, IntArrayRef size, at::MemoryFormat format) {
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format != at::MemoryFormat::Contiguous) tensor.unsafeGetTensorImpl()->empty_tensor_restride(format);
  return tensor;
}

// Of tensors that a transform, a trace or a subclass sees.
constexpr c10::DispatchKeySet watchers({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                        c10::DispatchKey::Batched, c10::DispatchKey::Python,
                                        c10::DispatchKey::Functionalize});

// Of tensors whose values are not those in memory.
constexpr c10::DispatchKeySet lazy({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                    c10::DispatchKey::ZeroTensor});

}  // namespace

bool is_plain_on_cpu(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(watchers | lazy) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

Tensor shape_only(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format) {
  return is_plain_on_cpu(like) ? shape_only_beside_plain(size, like, format)
                               : at::empty_symint(size, like.options(), format);
}

Tensor shape_only_beside_plain(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format) {
  if (const auto numbers = c10::asIntArrayRefSlowOpt(size)) {
    const int64_t numel = c10::multiply_integers(*numbers);
    if (auto zeros = numel > 0 ? readable_zeros(numel * like.element_size()) : std::nullopt) {
      const auto shape = at::detail::make_tensor<c10::TensorImpl>(
          std::move(*zeros), c10::DispatchKeySet(c10::DispatchKey::CPU), like.dtype());
      return resized(shape, *numbers, format);
    }
  }
  return at::empty_symint(size, like.options(), format);
}

Tensor without_data(SymIntArrayRef size, const Tensor& like, at::MemoryFormat format) {
  if (like.is_meta() || like.key_set().has_any(watchers) || c10::impl::TorchDispatchModeTLS::any_modes_set()) {
    return at::empty({1}, like.options()).expand_symint(size);  // operators that all of these can follow
  }
  const Tensor result = empty_beside(like, c10::SymInt(0), at::MemoryFormat::Contiguous, like.scalar_type());
  return resized(result, C10_AS_INTARRAYREF_SLOW(size), format);
}

}  // namespace freezekit
