#include "torch/autograd/kept.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/library.h>

#include <string>

#include "torch/common/operators.h"

namespace freezekit {
namespace {

using at::Tensor;

enum class Hooks : int8_t { harmless, checkpoint, strange };

// Torch's own hooks change no value: they are those of checkpoints, whose second run need not give the first one's bits,
// and of offloading. Freezekit's only look.
Hooks kind_of(const c10::SafePyObject& pack_hook) {
  const pybind11::gil_scoped_acquire gil;
  const pybind11::handle hook(pack_hook.ptr(getPyInterpreter()));
  const pybind11::object module = pybind11::getattr(hook, "__module__", pybind11::none());
  if (!pybind11::isinstance<pybind11::str>(module)) return Hooks::strange;
  const auto name = module.cast<std::string>();
  if (name == "torch.utils.checkpoint") return Hooks::checkpoint;
  return name.starts_with("torch.") || name.starts_with("freezekit.") ? Hooks::harmless : Hooks::strange;
}

Hooks hooks_in_this_thread() {
  const auto hooks = at::SavedTensorDefaultHooks::get_hooks();
  return hooks ? kind_of(hooks->first) : Hooks::harmless;
}

// "Promotion for Float8 Types is not supported", says torch.
constexpr at::ScalarType kOpaque = at::kFloat8_e4m3fn;

// No dispatch mode sees how bits are shown: what a checkpoint keeps must not depend on the modes that are on.
class BelowModes {
  const c10::impl::ExcludeDispatchKeyGuard guard_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

// A sum over all bytes and their places. It is never waited for: the device compares it too.
Tensor checksum_of(const Tensor& bytes) {
  constexpr int64_t kOdd = 0x1e3779b97f4a7c15, kOther = 0x3f58476d1ce4e5b9;
  const Tensor flat = bytes.reshape(-1);
  const Tensor words = flat.numel() % 4 == 0 && flat.storage_offset() % 4 == 0 ? flat.view(at::kInt) : flat;
  Tensor mixed = at::arange(1, words.numel() + 1, words.options().dtype(at::kLong)).mul_(kOdd);
  mixed.bitwise_xor_(words).mul_(kOther);
  return mixed.bitwise_xor_(mixed.bitwise_right_shift(32)).sum();
}

const std::string kCause =
    "saved-tensor hooks must give back the values that they were given. Freezekit keeps packed bits as uint8; ";

const std::string kSwitched =
    "a checkpoint must keep the same in both of its passes. The first one kept packed bits, as bytes of size [";

using Restore = Tensor(const Tensor& bytes, const std::optional<Tensor>& checksum, at::ScalarType dtype,
                       at::IntArrayRef size, at::IntArrayRef stride);

Tensor restore_bytes(const Tensor& given, const std::optional<Tensor>& checksum, at::ScalarType dtype,
                     at::IntArrayRef size, at::IntArrayRef stride) {
  const int64_t count = c10::multiply_integers(size) * static_cast<int64_t>(c10::elementSize(dtype));
  if (!checksum) {
    TORCH_CHECK(
        given.scalar_type() == kOpaque && given.dim() == 1 && given.size(0) == count, kSwitched, count,
        "], the second one ", given.scalar_type(), " of size ", given.sizes(),
        ": something was switched in between, such as torch.use_deterministic_algorithms, freezekit.enable() or "
        "freezekit.backend");
    return given.view(at::kByte).clone().view(dtype).as_strided(size, stride);
  }
  TORCH_CHECK(given.dim() == 1 && given.size(0) == count, kCause, "of a tensor of size [", count,
              "] they made one of size ", given.sizes());
  const Tensor bytes = at::empty({count}, given.options().dtype(at::kByte)).copy_(given);
  at::_assert_async(checksum_of(bytes).eq(*checksum),
                    kCause + "what came back, as " + c10::toString(given.scalar_type()) +
                        ", holds other values. Casts to float16 or bfloat16 and back do no harm, shorter ones do: "
                        "let them pass by tensors for which is_floating_point() is False");
  return bytes.view(dtype).as_strided(size, stride);
}

Tensor restore_meta(const Tensor& given, const std::optional<Tensor>&, at::ScalarType dtype, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  return at::empty_strided(size, stride, given.options().dtype(dtype));
}

}  // namespace

KeptTensor::KeptTensor(const Tensor& tensor) {
  const bool is_numbers = !tensor.defined() || !at::isIntegralType(tensor.scalar_type(), /*includeBool=*/true);
  const Hooks hooks = is_numbers ? Hooks::harmless : hooks_in_this_thread();
  const bool is_shown = hooks == Hooks::checkpoint ? !tensor.key_set().has_any(at::kTensorSubclassLike)
                                                   : hooks == Hooks::strange && !at::isTensorSubclassLike(tensor);
  if (!is_shown) {
    variable = torch::autograd::SavedVariable(tensor, /*is_output=*/false);
    return;
  }
  TORCH_INTERNAL_ASSERT(tensor.is_non_overlapping_and_dense());
  Tensor bytes;
  {
    const BelowModes below;
    bytes = tensor.as_strided({tensor.numel()}, {1}).view(hooks == Hooks::checkpoint ? kOpaque : at::kByte);
  }
  original_ = std::make_unique<Original>(
      Original{tensor.scalar_type(), tensor.sizes().vec(), tensor.strides().vec(), tensor.device(),
               hooks == Hooks::checkpoint ? std::nullopt : std::make_optional(checksum_of(bytes))});
  variable = torch::autograd::SavedVariable(bytes, /*is_output=*/false);
}

KeptTensor KeptTensor::of_result(const Tensor& result) {
  KeptTensor kept;
  kept.variable = torch::autograd::SavedVariable(result, /*is_output=*/true);
  kept.is_result = true;
  return kept;
}

Tensor KeptTensor::unpack(AnyNodePtr node) const {
  const Tensor given = variable.unpack(std::move(node));
  if (!original_ || !given.defined()) return given;
  const auto device = original_->device;
  TORCH_CHECK(given.device() == device, kCause, "of a tensor on ", device, " they made one on ", given.device());
  static const auto op = find_operator<Restore>("freezekit::restore_bytes");
  return op.call(given, original_->checksum, original_->dtype, original_->size, original_->stride);
}

}  // namespace freezekit

// An operator, since compiled autograd traces what is done to what hooks give back before it knows that.
TORCH_LIBRARY_FRAGMENT(freezekit, m) {
  m.def("restore_bytes(Tensor bytes, Tensor? checksum, ScalarType dtype, int[] size, int[] stride) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(freezekit, CompositeExplicitAutograd, m) { m.impl("restore_bytes", freezekit::restore_bytes); }
TORCH_LIBRARY_IMPL(freezekit, Meta, m) { m.impl("restore_bytes", freezekit::restore_meta); }
