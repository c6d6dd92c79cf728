#include "torch/chains/recipes.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/affine.h"
#include "torch/backends/cpu_formats.h"

namespace freezekit::chain {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// Below autograd, so that nothing of it is recorded or seen.
template <class F>
auto unrecorded(const F& f) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return f();
}

template <class T, class Channels>
FK_SIMD_CLONES void write_row(const T* x, Channels channels, T* y, int64_t count) {
  cpu::affine_row(x, channels, y, count);
}

template <class T, class Channels>
FK_SIMD_CLONES bool is_row(const T* x, Channels channels, const T* y, int64_t count) {
  return cpu::is_affine_row(x, channels, y, count);
}

// The elements of (N, C, ...) as rows in memory order; by_channel where a row is of one channel.
struct Rows {
  int64_t count, length, per_image;
  bool by_channel;

  explicit Rows(const Tensor& x) {
    const int64_t n = x.size(0), c = x.size(1), plane = x.numel() / (n * c);
    by_channel = x.is_contiguous();
    per_image = by_channel ? c : plane;
    count = n * per_image, length = by_channel ? plane : c;
  }

  // f(offset of the row in memory, its scales and shifts) for each row, as long as it returns true.
  template <class C, class F>
  bool all(const C* scale, const C* shift, int64_t channels, const F& f) const {
    std::atomic<bool> result = true;
    at::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / length), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last && result; ++row) {
        const int64_t c = by_channel ? row : row / per_image * channels;
        const bool goes_on = by_channel ? f(row * length, cpu::One<C>{scale[c], shift[c]})
                                        : f(row * length, cpu::Each<C>{scale + c, shift + c});
        if (!goes_on) result = false;
      }
    });
    return result;
  }
};

class GroupNorm : public Recipe {
 public:
  GroupNorm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias)
      : x_(x), mean_(mean), rstd_(rstd), weight_(weight), bias_(bias) {}

  Tensor compute() const override {
    for (const Held* held : {&x_, &mean_, &rstd_}) held->get();
    const Tensor y = unrecorded([&] { return at::empty_like(x_.unchecked()); });
    all_rows([&](const auto* x, auto channels, int64_t at, int64_t length) {
      write_row(x, channels, y.mutable_data_ptr<std::remove_const_t<std::remove_pointer_t<decltype(x)>>>() + at,
                length);
      return true;
    });
    return y;
  }

  bool gives(const Tensor& value) const override {
    const Tensor& x = x_.unchecked();
    if (value.scalar_type() != x.scalar_type() || value.sizes() != x.sizes() || value.strides() != x.strides() ||
        !is_in_memory(value)) {
      return false;
    }
    return all_rows([&](const auto* x, auto channels, int64_t at, int64_t length) {
      const auto* y = value.const_data_ptr<std::remove_const_t<std::remove_pointer_t<decltype(x)>>>();
      return is_row(x, channels, y + at, length);
    });
  }

 private:
  // f(the row of x, its scales and shifts, its offset, its length) for each row, as long as it returns true.
  template <class F>
  bool all_rows(const F& f) const {
    const Tensor &x = x_.unchecked(), &means = mean_.unchecked(), &rstds = rstd_.unchecked();
    return AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "freezekit::chain", [&] {
      using C = scalar_t;
      const int64_t n = x.size(0), c = x.size(1), groups = means.size(1), width = c / groups;
      const C* mean = means.const_data_ptr<C>();
      const C* rstd = rstds.const_data_ptr<C>();
      std::vector<C> scale(n * c), shift(n * c);
      for (int64_t i = 0; i < n * c; ++i) {
        const int64_t group = i / c * groups + i % c / width;
        scale[i] = rstd[group] * value_of<C>(weight_, i % c, 1);
        shift[i] = std::fma(-scale[i], mean[group], value_of<C>(bias_, i % c, 0));
      }
      const scalar_t* from = x.const_data_ptr<scalar_t>();
      const Rows rows(x);
      return rows.all(scale.data(), shift.data(), c,
                      [&](int64_t at, auto channels) { return f(from + at, channels, at, rows.length); });
    });
  }

  template <class C>
  static C value_of(const Tensor& parameter, int64_t i, C otherwise) {
    return parameter.defined() ? parameter.const_data_ptr<C>()[i] : otherwise;
  }

  Held x_, mean_, rstd_;
  Tensor weight_, bias_;
};

// The elements of a dense tensor in memory order.
Tensor flat(const Tensor& dense) { return dense.as_strided({dense.numel()}, {1}); }

constexpr int64_t kHashed = 1 << 16;  // bytes in one piece

// Eight sums of products, each word with a key of its place. Few changes of a word leave its sum as it was.
FK_SIMD_CLONES uint64_t hash_of(const char* bytes, int64_t count, uint64_t key) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
  uint64_t sums[8] = {}, keys[8];
  for (int i = 0; i < 8; ++i) keys[i] = key + kOdd * (i + 1);
  const auto add = [&](const char* from) {
    uint64_t words[8];
    std::memcpy(words, from, sizeof words);
    for (int i = 0; i < 8; ++i) {
      const uint64_t word = words[i] ^ keys[i];
      sums[i] += words[i] + (word & 0xffffffffu) * (word >> 32);
      keys[i] += kOdd * 8;
    }
  };
  int64_t at = 0;
  for (; at + 64 <= count; at += 64) add(bytes + at);
  if (at < count) {
    char rest[64] = {};
    std::memcpy(rest, bytes + at, count - at);
    add(rest);
  }
  uint64_t result = static_cast<uint64_t>(count);
  for (int i = 0; i < 8; ++i) result = (result ^ sums[i]) * kOdd, result ^= result >> 29;
  return result;
}

// Of all bytes of a tensor in memory; the same for any number of threads.
uint64_t content_of(const Tensor& tensor) {
  const char* bytes = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t count = tensor.numel() * tensor.element_size();
  std::atomic<uint64_t> sum = 0;
  at::parallel_for(0, (count + kHashed - 1) / kHashed, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sum += hash_of(bytes + i * kHashed, std::min(kHashed, count - i * kHashed), static_cast<uint64_t>(i) << 32);
    }
  });
  return sum;
}

template <class Source>
class FunctionOf : public Recipe {
 public:
  FunctionOf(Source x, Function f) : x_(std::move(x)), f_(std::move(f)) {}

  Tensor compute() const override {
    return unrecorded([&] { return f_(operand(x_)); });
  }

  // In pieces that stay in the cache. They begin where torch's own threads would begin, since the last elements of a
  // thread's share are not computed as the others are.
  bool gives(const Tensor& value) const override {
    return unrecorded([&] {
      const Tensor x = just_held(x_);
      if (value.scalar_type() != x.scalar_type() || value.strides() != x.strides() || value.sizes() != x.sizes() ||
          !is_in_memory(value)) {
        return false;
      }
      const Tensor from = flat(x), found = flat(value);
      std::atomic<bool> same = true;
      at::parallel_for(0, x.numel(), at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last && same; i += kElementsPerTask) {
          const int64_t count = std::min(kElementsPerTask, last - i);
          const Tensor piece = unrecorded([&] { return f_(from.narrow(0, i, count)); });
          const char* bytes = static_cast<const char*>(found.const_data_ptr()) + i * found.element_size();
          if (std::memcmp(piece.const_data_ptr(), bytes, count * found.element_size()) != 0) same = false;
        }
      });
      return same.load();
    });
  }

 private:
  static Tensor just_held(const Held& x) { return x.unchecked(); }
  static Tensor just_held(const RecipePtr& x) { return x->compute(); }
  static Tensor operand(const Held& x) { return x.get(); }
  static Tensor operand(const RecipePtr& x) { return x->compute(); }

  Source x_;
  Function f_;
};

}  // namespace

bool is_in_memory(const Tensor& tensor) {
  if (!tensor.device().is_cpu() || tensor.key_set().has(c10::DispatchKey::Python) || !tensor.has_storage() ||
      !tensor.storage().device().is_cpu() || !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  const size_t end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size();
  return tensor.storage().nbytes() >= end;
}

Held::Held(const Tensor& tensor)
    : tensor_(tensor.detach()), version_(tensor_._version()),
      content_(is_in_memory(tensor_) ? content_of(tensor_) : 0) {}

const Tensor& Held::get() const {
  TORCH_CHECK(tensor_._version() == version_,
              "one of the variables needed for gradient computation has been modified by an inplace operation: [",
              tensor_.toString(), " ", tensor_.sizes(), "] is at version ", tensor_._version(), "; expected version ",
              version_, " instead.");
  TORCH_CHECK(is_in_memory(tensor_) && content_of(tensor_) == content_,
              "one of the variables needed for gradient computation has been written to, or its memory released, in a "
              "way that autograd does not see (.data, numpy, its storage): [",
              tensor_.toString(), " ", tensor_.sizes(),
              "]. While freezekit is enabled, the operand of an operator behind it is computed again from it.");
  return tensor_;
}

// Torch rounds the statistics of low precision, and without parameters its formula is another. Of few elements in a
// channel the parameters' values weigh as much as what is saved.
bool can_be_made_again(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto dtype = [&](const Tensor& t) { return !t.defined() || t.scalar_type() == x.scalar_type(); };
  const bool is_wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
  return is_wide && dtype(weight) && dtype(bias) && x.dim() >= 2 && x.size(1) > 0 &&
         (weight.defined() || bias.defined()) && x.numel() >= 16 * x.size(1);
}

RecipePtr group_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                     bool has_data) {
  if (!can_be_made_again(x, weight, bias)) return nullptr;
  const int64_t n = x.size(0), c = x.size(1);
  const bool are_statistics =
      mean.dim() == 2 && mean.size(0) == n && mean.sizes() == rstd.sizes() && mean.size(1) > 0 && c % mean.size(1) == 0;
  if (!are_statistics) return nullptr;
  for (const Tensor* vector : {&mean, &rstd, &weight, &bias}) {
    if (!vector->defined()) continue;
    if (vector->scalar_type() != x.scalar_type() || !vector->is_contiguous() || (has_data && !is_in_memory(*vector))) {
      return nullptr;
    }
  }
  for (const Tensor* vector : {&weight, &bias}) {
    if (vector->defined() && (vector->dim() != 1 || vector->size(0) != c)) return nullptr;
  }
  const bool is_ordered = x.is_contiguous() || x.is_contiguous(x.suggest_memory_format());
  if (!is_ordered || (has_data && !is_in_memory(x))) return nullptr;
  return std::make_shared<GroupNorm>(x, mean, rstd, weight, bias);
}

RecipePtr function_of(const Tensor& x, Function f, bool has_data) {
  if (!x.is_non_overlapping_and_dense() || (has_data && !is_in_memory(x))) return nullptr;
  return std::make_shared<FunctionOf<Held>>(Held(x), std::move(f));
}

RecipePtr function_of(RecipePtr x, Function f) {
  return std::make_shared<FunctionOf<RecipePtr>>(std::move(x), std::move(f));
}

}  // namespace freezekit::chain
