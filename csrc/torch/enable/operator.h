// Torch's operators with a stand-in: while freezekit is enabled, a kernel of freezekit's answers on their autograd keys
// of CPU, CUDA and Meta, and hands every call that it gains nothing from to the kernel that torch has there.
//
//   std::optional<Tensor> relu(const Stock<Tensor(const Tensor&)>& op, DispatchKeySet keys, const Tensor& x);
//   StandIn<relu> of_relu("relu", "relu");
//
// A function is asked where a gradient is recorded; what it gives nothing for is torch's.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "torch/common/operators.h"
#include "torch/common/unseen.h"

namespace freezekit::enable {

using at::Tensor;
using c10::DispatchKeySet;

class AnyStandIn {
 public:
  AnyStandIn(const AnyStandIn&) = delete;

  // The stand-ins are registered with the libraries, one for each of `keys`, except where another library has taken the
  // operator on the key. The names of those operators are returned.
  static std::vector<std::string> take_over(c10::ArrayRef<torch::Library*> libraries,
                                            c10::ArrayRef<c10::DispatchKey> keys);
  static std::vector<std::string> names();

 protected:
  AnyStandIn(const char* name, torch::CppFunction (*stand_in)(), const char* computes);
  ~AnyStandIn() = default;

 private:
  virtual void bind(const c10::OperatorHandle&) = 0;

  const char* name_;
  torch::CppFunction (*stand_in_)();
  const char* computes_;
};

// Torch's side of an operator: the ways on that a stand-in has.
template <class Signature>
class Stock;

template <class Result, class... Args>
class Stock<Result(Args...)> {
 public:
  // What torch has for the call: one kernel for the autograd keys of all devices, of which no stand-in hides the last.
  // `keys` may have keys above autograd's, which have had their turn.
  Result stock(DispatchKeySet keys, Args... args) const {
    const auto others = (keys & c10::after_autograd_keyset).add(c10::DispatchKey::AutogradOther);
    return handle_->redispatch(others, std::forward<Args>(args)...);
  }

  // What torch's kernel does where no gradient is recorded, reverse or forward: it calls the one below.
  Result unrecorded(DispatchKeySet keys, Args... args) const {
    // In-place operators count up the version on the way.
    using Guard = std::conditional_t<std::is_reference_v<Result>, at::AutoDispatchBelowAutograd,
                                     at::AutoDispatchBelowADInplaceOrView>;
    const Guard guard;
    return handle_->redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
  }

  // The operator below autograd, for a result that freezekit's node is put behind.
  Result forward(DispatchKeySet keys, Args... args) const {
    static_assert(!std::is_reference_v<Result>);
    return unrecorded(keys, std::forward<Args>(args)...);
  }

  void bind(const c10::OperatorHandle& handle) {
    if (!handle_) handle_ = handle.typed<Result(Args...)>();  // once: another thread may be reading it
  }

 private:
  std::optional<c10::TypedOperatorHandle<Result(Args...)>> handle_;
};

// What a stand-in gives: a result, or of a call in place the tensor that was written to; nothing where the call is torch's.
template <class Result>
using Served = std::conditional_t<std::is_reference_v<Result>, std::remove_reference_t<Result>*, std::optional<Result>>;

inline std::optional<Tensor> served(Tensor&& result) { return std::move(result); }
inline Tensor* served(Tensor& written) { return &written; }

// Of operators on one tensor, which X says: const Tensor&, or Tensor& of a call in place.
template <class X>
constexpr bool kInPlace = std::is_same_v<X, Tensor&>;
template <class X>
using ResultOf = std::conditional_t<kInPlace<X>, Tensor&, Tensor>;
template <class X, class... Rest>
using Unary = Stock<ResultOf<X>(X, Rest...)>;

// The tensors among a call's arguments.
inline std::tuple<const Tensor&> tensors_in(const Tensor& tensor) { return {tensor}; }
inline std::tuple<const Tensor&> tensors_in(const OptionalTensor& tensor) { return {tensor_of(tensor)}; }
template <class Other>
std::tuple<> tensors_in(const Other&) {
  return {};
}

// Where a call goes of which no gradient is recorded. Torch composes some operators of others, which modes and tracers see:
// under one of these torch's own kernel is called.
enum class Unrecorded : int8_t { below, below_if_unseen, to_torch };

// Registers kFunction for one operator; a function that stands in for several is a template.
template <auto kFunction, Unrecorded kUnrecorded = Unrecorded::below>
class StandIn;

template <class Result, class... Args,
          Served<Result> (*kFunction)(const Stock<Result(Args...)>&, DispatchKeySet, Args...), Unrecorded kUnrecorded>
class StandIn<kFunction, kUnrecorded> final : public AnyStandIn {
 public:
  // `computes`: the operator whose kernel on a CPU or a GPU the stand-in does without; none where it calls torch's.
  explicit StandIn(const char* name, const char* computes = nullptr)
      : AnyStandIn(name, [] { return torch::CppFunction(TORCH_FN(kernel)); }, computes) {}

 private:
  // A function without state: it can be called while it is being replaced.
  static Result kernel(DispatchKeySet keys, Args... args) {
    const auto tensors = std::tuple_cat(tensors_in(args)...);
    if (!std::apply([](const auto&... each) { return is_unrecorded(each...); }, tensors)) {
      if (Served<Result> result = kFunction(stock_, keys, args...)) return *std::move(result);
    } else if (kUnrecorded == Unrecorded::below ||
               (kUnrecorded == Unrecorded::below_if_unseen &&
                std::apply([](const auto&... each) { return is_unseen(each...); }, tensors))) {
      return stock_.unrecorded(keys, std::forward<Args>(args)...);
    }
    return stock_.stock(keys, std::forward<Args>(args)...);
  }

  void bind(const c10::OperatorHandle& handle) override { stock_.bind(handle); }

  static inline Stock<Result(Args...)> stock_;
};

}  // namespace freezekit::enable
