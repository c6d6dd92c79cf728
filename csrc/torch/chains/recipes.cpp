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
      : x_(x), mean_(mean), rstd_(rstd), weight_(copied(weight)), bias_(copied(bias)) {}

  Tensor compute() const override {
    const Tensor y = at::empty_like(x_.get());
    all_rows([&](const auto* x, auto channels, int64_t at, int64_t length) {
      write_row(x, channels, y.mutable_data_ptr<std::remove_const_t<std::remove_pointer_t<decltype(x)>>>() + at,
                length);
      return true;
    });
    return y;
  }

  bool gives(const Tensor& value) const override {
    const Tensor& x = x_.get();
    if (value.scalar_type() != x.scalar_type() || value.sizes() != x.sizes() || value.strides() != x.strides()) {
      return false;
    }
    return all_rows([&](const auto* x, auto channels, int64_t at, int64_t length) {
      const auto* y = value.const_data_ptr<std::remove_const_t<std::remove_pointer_t<decltype(x)>>>();
      return is_row(x, channels, y + at, length);
    });
  }

 private:
  // Parameters may move before backward, and the value does not follow them. They are a channel's worth.
  static Tensor copied(const Tensor& parameter) {
    return parameter.defined() ? unrecorded([&] { return parameter.clone(); }) : Tensor();
  }

  // f(the row of x, its scales and shifts, its offset, its length) for each row, as long as it returns true.
  template <class F>
  bool all_rows(const F& f) const {
    const Tensor& x = x_.get();
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "freezekit::chain", [&] {
      using C = cpu::Compute<scalar_t>;
      const int64_t n = x.size(0), c = x.size(1), groups = mean_.get().size(1), width = c / groups;
      const C* mean = mean_.get().const_data_ptr<C>();
      const C* rstd = rstd_.get().const_data_ptr<C>();
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
      const Tensor x = operand(x_);
      if (value.scalar_type() != x.scalar_type() || value.strides() != x.strides() || value.sizes() != x.sizes() ||
          !x.is_non_overlapping_and_dense()) {
        return false;
      }
      const Tensor from = flat(x), found = flat(value);
      std::atomic<bool> same = true;
      at::parallel_for(0, x.numel(), at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last && same; i += kElementsPerTask) {
          const int64_t count = std::min(kElementsPerTask, last - i);
          const Tensor piece = f_(from.narrow(0, i, count));
          const char* bytes = static_cast<const char*>(found.const_data_ptr()) + i * found.element_size();
          if (std::memcmp(piece.const_data_ptr(), bytes, count * found.element_size()) != 0) same = false;
        }
      });
      return same.load();
    });
  }

 private:
  static Tensor operand(const Held& x) { return x.get(); }
  static Tensor operand(const RecipePtr& x) { return x->compute(); }

  Source x_;
  Function f_;
};

}  // namespace

const Tensor& Held::get() const {
  TORCH_CHECK(tensor_._version() == version_,
              "one of the variables needed for gradient computation has been modified by an inplace operation: [",
              tensor_.toString(), " ", tensor_.sizes(), "] is at version ", tensor_._version(), "; expected version ",
              version_, " instead.");
  return tensor_;
}

RecipePtr group_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                     const Tensor& bias) {
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor* vector : {&mean, &rstd, &weight, &bias}) {
    if (vector->defined() && (vector->scalar_type() != wide || !vector->is_contiguous())) return nullptr;
  }
  const bool is_dense = x.is_contiguous() || x.is_contiguous(x.suggest_memory_format());
  if (!x.is_cpu() || x.dim() < 2 || x.numel() == 0 || !is_dense) return nullptr;
  return std::make_shared<GroupNorm>(x, mean, rstd, weight, bias);
}

RecipePtr function_of(const Tensor& x, Function f) { return std::make_shared<FunctionOf<Held>>(Held(x), std::move(f)); }

RecipePtr function_of(RecipePtr x, Function f) {
  return std::make_shared<FunctionOf<RecipePtr>>(std::move(x), std::move(f));
}

}  // namespace freezekit::chain
