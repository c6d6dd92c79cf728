#include "torch/chains/recipes.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/affine.h"
#include "torch/backends/cpu_formats.h"
#include "torch/common/lanes.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit::chain {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;
// Of the trial of a function, in elements: what torch gives to one thread at least. Smaller pieces take longer: views and
// calls for one take the time of some thousand elements.
constexpr int64_t kPiece = at::internal::GRAIN_SIZE;

// Below autograd, so that nothing of it is recorded or seen.
template <class F>
auto unrecorded(const F& f) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return f();
}

std::vector<Tensor> with_defined(std::vector<Tensor> tensors, const std::vector<Tensor>& more) {
  std::copy_if(more.begin(), more.end(), std::back_inserter(tensors), [](const Tensor& t) { return t.defined(); });
  return tensors;
}

// Of one tensor that is kept. What is made of parameters and statistics is its own: nobody else can write to it.
class OfOne : public Recipe {
 public:
  explicit OfOne(const Tensor& x) : x_(x) {}

  void hold() override { x_.hold(); }
  void check(bool bytes) const override { x_.check(bytes); }

 protected:
  Held x_;
};

// x * scale + shift, as torch computes group and batch norms.
template <class T>
class AffineNorm : public OfOne {
 public:
  // x: (N, C, ...). Of the N * C channels in a row, `width` share a mean and rstd. Where a vector ends, it begins again;
  // weight and bias, as they were for x, may be undefined.
  AffineNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd,
             int64_t width)
      : OfOne(x), scales_and_shifts_(unrecorded([&] {
          const c10::SymInt count = 2 * x.size(0) * x.size(1);
          return empty_beside(x, count, at::MemoryFormat::Contiguous, x.scalar_type());
        })) {
    if (!is_in_memory(x)) return;
    const auto values_of = [](const Tensor& vector) { return vector.defined() ? vector.const_data_ptr<T>() : nullptr; };
    const T *const w = values_of(weight), *const b = values_of(bias);
    const T *const m = values_of(mean), *const r = values_of(rstd);
    const int64_t n = x.size(0), c = x.size(1), statistics = mean.numel();
    const int64_t channels = w ? weight.numel() : b ? bias.numel() : c;
    T *scale = scales_and_shifts_.mutable_data_ptr<T>(), *shift = scale + n * c;
    rounded_twice_.reserve(n * c);
    for (int64_t i = 0; i < n * c; i += width) {
      const T mean_here = m[i / width % statistics], rstd_here = r[i / width % statistics];
      for (int64_t channel = i % channels, end = channel + width; channel < end; ++channel, ++scale, ++shift) {
        const T bias_here = b ? b[channel] : T(0);
        *scale = rstd_here * (w ? w[channel] : T(1));
        *shift = std::fma(-*scale, mean_here, bias_here);
        rounded_twice_.push_back(bias_here - *scale * mean_here);
      }
    }
  }

  Tensor compute() const override {
    const Tensor& x = x_.tensor();
    const Tensor y = empty_beside(x, x.sym_sizes(), x.sym_strides(), x.scalar_type());
    T* to = y.mutable_data_ptr<T>();
    all_rows([&]<class Channels>(const cpu::AffineRows<T>& rows, int64_t first, int64_t last) {
      cpu::in_vectors<cpu::affine_rows<Channels, T>>(rows, to, first, last);
      return true;
    });
    return y;
  }

  bool gives(const Tensor& value) const override {
    const Tensor& x = x_.tensor();
    if (value.scalar_type() != x.scalar_type() || value.sizes() != x.sizes() || value.strides() != x.strides() ||
        !is_in_memory(value)) {
      return false;
    }
    const auto is_value = [&, y = value.const_data_ptr<T>()] {
      return all_rows([&]<class Channels>(const cpu::AffineRows<T>& rows, int64_t first, int64_t last) {
        return cpu::in_vectors<cpu::are_affine_rows<Channels, T>>(rows, y, first, last);
      });
    };
    // Whether a shift is rounded once or twice was decided by the compiler of this torch.
    const std::vector<T> others = std::exchange(rounded_twice_, {});
    if (is_value()) return true;
    std::copy(others.begin(), others.end(), scales_and_shifts_.mutable_data_ptr<T>() + others.size());
    return is_value();
  }

  std::vector<Tensor> reads() const override { return {x_.tensor(), scales_and_shifts_}; }

 private:
  // f(the rows of x, the first, the last) for parts of them.
  template <class F>
  bool all_rows(const F& f) const {
    const Tensor& x = x_.tensor();
    const int64_t n = x.size(0), c = x.size(1), plane = x.numel() / (n * c);
    const T *const scale = scales_and_shifts_.const_data_ptr<T>(), *const shift = scale + n * c;
    const bool by_channel = x.is_contiguous();
    const auto rows = by_channel ? cpu::AffineRows<T>{x.const_data_ptr<T>(), scale, shift, plane, 1, 1}
                                 : cpu::AffineRows<T>{x.const_data_ptr<T>(), scale, shift, c, plane, c};
    std::atomic<bool> result = true;
    at::parallel_for(0, x.numel() / rows.length, std::max<int64_t>(1, kElementsPerTask / rows.length),
                     [&](int64_t first, int64_t last) {
                       const bool holds = by_channel ? f.template operator()<cpu::One<T>>(rows, first, last)
                                                     : f.template operator()<cpu::Each<T>>(rows, first, last);
                       if (!holds) result = false;
                     });
    return result;
  }

  Tensor scales_and_shifts_;              // (2, N, C)
  mutable std::vector<T> rounded_twice_;  // shifts, until the trial
};

// Torch normalises each row by itself, on however many threads.
class LayerNorm : public OfOne {
 public:
  // x: contiguous rows of that shape. weight, bias: of one row, as they were for x, or undefined.
  LayerNorm(const Tensor& x, at::IntArrayRef shape, const Tensor& weight, const Tensor& bias, double eps)
      : OfOne(x), shape_(shape.vec()), weight_(copy_of(weight)), bias_(copy_of(bias)), eps_(eps) {}

  std::vector<Tensor> reads() const override { return with_defined({x_.tensor()}, {weight_, bias_}); }

  Tensor compute() const override {
    return unrecorded([&] { return of_rows(x_.tensor()); });
  }

  // In pieces that fit the cache.
  bool gives(const Tensor& value) const override {
    const Tensor& x = x_.tensor();
    if (value.scalar_type() != x.scalar_type() || value.sizes() != x.sizes() || !value.is_contiguous() ||
        !is_in_memory(value)) {
      return false;
    }
    std::vector<int64_t> size = shape_;
    size.insert(size.begin(), -1);
    const Tensor all = unrecorded([&] { return x.view(size); });
    const int64_t length = c10::multiply_integers(shape_), bytes = length * value.element_size();
    const int64_t piece = std::max<int64_t>(1, kElementsPerTask / length);
    const char* expected = static_cast<const char*>(value.const_data_ptr());
    std::atomic<bool> same = true;
    at::parallel_for(0, all.size(0), piece, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last && same; i += piece) {
        const int64_t count = std::min(piece, last - i);
        const Tensor made = unrecorded([&] { return of_rows(all.narrow(0, i, count)); });
        if (std::memcmp(made.const_data_ptr(), expected + i * bytes, count * bytes) != 0) same = false;
      }
    });
    return same;
  }

 private:
  Tensor of_rows(const Tensor& rows) const {
    return std::get<0>(at::native_layer_norm(rows, shape_, weight_, bias_, eps_));
  }

  std::vector<int64_t> shape_;
  Tensor weight_, bias_;
  double eps_;
};

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
  const Rows rows = *rows_of(tensor);
  const int64_t size = tensor.element_size(), length = rows.length * size;
  const int64_t pieces = (length + kHashed - 1) / kHashed;  // of a row
  if (rows.count == 1 && pieces == 1) return hash_of(bytes, length, 0);
  const int64_t per_task = pieces == 1 ? kHashed / length : 1;
  std::atomic<uint64_t> sum = 0;
  at::parallel_for(0, rows.count * pieces, per_task, [&](int64_t first, int64_t last) {
    uint64_t own = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / pieces, at = i % pieces * kHashed;
      own += hash_of(bytes + row * rows.stride * size + at, std::min(kHashed, length - at),
                     static_cast<uint64_t>(i) << 32);
    }
    sum += own;
  });
  return sum;
}

// f(first element, elements, how many of these fill pairs of vectors) for pieces of a dense tensor, as torch gives its
// elements to threads, as long as it returns true.
template <class F>
bool all_pieces(int64_t numel, int64_t piece, const F& f) {
  if (numel <= piece) return f(0, numel, numel - numel % (2 * lanes()));
  std::atomic<bool> result = true;
  at::parallel_for(0, numel, at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && result; i += piece) {
      const int64_t count = std::min(piece, last - i);
      if (!f(i, count, count - count % (2 * lanes()))) result = false;
    }
  });
  return result;
}

bool has_sigmoid(const Tensor& x) {
  return lanes() != 0 && x.scalar_type() == at::kFloat && x.is_non_overlapping_and_dense();
}

Tensor compute(const cpu::Sigmoid& f, const Tensor& x) {
  const Tensor y = empty_elementwise(x);
  const float* const from = x.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  all_pieces(x.numel(), at::internal::GRAIN_SIZE, [&](int64_t i, int64_t count, int64_t in_vectors) {
    cpu::in_vectors<cpu::sigmoid_row>(from + i, to + i, in_vectors, count, f);
    return true;
  });
  return y;
}

// Whether `value`, which is laid out like x, has the bits of what compute gives.
bool gives(const cpu::Sigmoid& f, const Tensor& x, const Tensor& value) {
  constexpr int64_t kTried = 1 << 12;  // pairs of vectors, as a share is
  const float *const from = x.const_data_ptr<float>(), *const to = value.const_data_ptr<float>();
  return all_pieces(x.numel(), kTried, [&](int64_t i, int64_t count, int64_t in_vectors) {
    return cpu::in_vectors<cpu::is_sigmoid_row>(from + i, to + i, in_vectors, count, f);
  });
}

template <class Source>
class FunctionOf : public Recipe {
 public:
  FunctionOf(Source x, Function f) : x_(std::move(x)), f_(std::move(f)) {}

  // In pieces. Torch computes the last elements of a thread's share and of a row by another path, and GELU of other layouts
  // than NCHW by another library: where pieces are not what they are in torch, the pass over all at once decides.
  bool gives(const Tensor& value) const override {
    const Tensor x = kept_or(&Recipe::take);
    const auto rows = rows_of(x);
    if (!rows || value.scalar_type() != x.scalar_type() || value.sizes() != x.sizes() || !is_elementwise(value, x) ||
        !is_in_memory(value)) {
      return false;
    }
    // What is made again is what the first trial found, for whoever shares the recipe.
    if (is_own_.value_or(true) && f_.own && has_sigmoid(x) && chain::gives(*f_.own, x, value)) {
      is_own_ = true;
      return true;
    }
    if (is_own_.value_or(false) || !f_.torchs || !torch_gives(value, x, *rows)) return false;
    is_own_ = false;
    return true;
  }

  void hold() override {
    if constexpr (kIsHeld) x_.hold();
  }

  void check(bool bytes) const override {
    if constexpr (kIsHeld) {
      x_.check(bytes);
    } else {
      x_->check(bytes);
    }
  }

  Tensor compute() const override {
    const Tensor x = kept_or(&Recipe::compute);
    return is_own_.value_or(false) ? chain::compute(*f_.own, x) : unrecorded([&] { return f_.torchs(x); });
  }

  std::vector<Tensor> reads() const override {
    if constexpr (kIsHeld) {
      return {x_.tensor()};
    } else {
      return x_->reads();
    }
  }

 private:
  static constexpr bool kIsHeld = std::is_same_v<Source, Held>;

  Tensor kept_or(Tensor (Recipe::*made)() const) const {
    if constexpr (kIsHeld) {
      return x_.tensor();
    } else {
      return ((*x_).*made)();
    }
  }
  // From element i on: the rest of a row, or whole rows; no more than a piece, and none beyond `last`.
  static Tensor piece_of(const Tensor& matrix, int64_t i, int64_t last) {
    const int64_t length = matrix.size(1), row = i / length, column = i % length;
    const int64_t end = std::min(last, i + kPiece), whole = (end - i) / length;
    if (column == 0 && whole > 0) return matrix.narrow(0, row, whole);
    return matrix.select(0, row).narrow(0, column, std::min(end, (row + 1) * length) - i);
  }

  // Whether the elements of `value` from i on, in memory order, have the bits of `part`.
  static bool is_at(const Tensor& value, int64_t i, const Tensor& part) {
    const int64_t size = value.element_size();
    return std::memcmp(static_cast<const char*>(value.const_data_ptr()) + i * size, part.const_data_ptr(),
                       part.numel() * size) == 0;
  }

  bool torch_gives(const Tensor& value, const Tensor& x, const Rows& rows) const {
    return unrecorded([&] {
      if (x.numel() <= kPiece) return is_at(value, 0, f_.torchs(x));
      const Tensor matrix = x.as_strided({rows.count, rows.length}, {rows.stride, 1});
      std::atomic<bool> same = true;
      at::parallel_for(0, x.numel(), kPiece, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last && same;) {
          const Tensor piece = unrecorded([&] { return f_.torchs(piece_of(matrix, i, last)); });
          if (!is_at(value, i, piece)) same = false;
          i += piece.numel();
        }
      });
      if (same) return true;
      const Tensor made = f_.torchs(x);
      return made.strides() == value.strides() && is_at(value, 0, made);
    });
  }

  Source x_;
  Function f_;
  mutable std::optional<bool> is_own_;  // by the first trial
};

class FormulaOf : public Recipe {
 public:
  // owned: what f has beside them, of its own.
  FormulaOf(std::vector<Held> kept, Formula f, std::vector<Tensor> owned = {})
      : kept_(std::move(kept)), f_(std::move(f)), owned_(std::move(owned)) {}

  void hold() override {
    for (Held& held : kept_) held.hold();
  }

  void check(bool bytes) const override {
    for (const Held& held : kept_) held.check(bytes);
  }

  Tensor compute() const override {
    return unrecorded([&] { return f_(held()); });
  }

  bool gives(const Tensor& value) const override {
    const Tensor made = compute();
    return made.scalar_type() == value.scalar_type() && made.sizes() == value.sizes() &&
           made.strides() == value.strides() && made.is_non_overlapping_and_dense() && is_in_memory(value) &&
           std::memcmp(made.const_data_ptr(), value.const_data_ptr(), value.nbytes()) == 0;
  }

  std::vector<Tensor> reads() const override { return with_defined(held(), owned_); }

 private:
  std::vector<Tensor> held() const {
    std::vector<Tensor> all;
    for (const Held& held : kept_) all.push_back(held.tensor());
    return all;
  }

  std::vector<Held> kept_;
  Formula f_;
  std::vector<Tensor> owned_;
};

// Of a contiguous tensor with other sizes.
class Seen : public Recipe {
 public:
  Seen(RecipePtr recipe, at::SymIntArrayRef size) : recipe_(std::move(recipe)), size_(size.vec()) {}

  bool gives(const Tensor& value) const override { return recipe_->gives(value); }
  void hold() override {}  // so it does
  void check(bool bytes) const override { recipe_->check(bytes); }
  std::vector<Tensor> reads() const override { return recipe_->reads(); }
  Tensor compute() const override { return seen(recipe_->compute()); }
  Tensor take() const override { return seen(recipe_->take()); }

 private:
  Tensor seen(const Tensor& whole) const {
    return unrecorded([&] { return whole.view_symint(size_); });
  }

  const RecipePtr recipe_;
  const std::vector<c10::SymInt> size_;
};

class Shared : public Recipe {
 public:
  explicit Shared(RecipePtr recipe) : recipe_(std::move(recipe)) {}

  bool gives(const Tensor& value) const override { return recipe_->gives(value); }
  void hold() override {}  // so it does
  std::vector<Tensor> reads() const override { return recipe_->reads(); }

  // What is there was made of what had stayed until then.
  void check(bool bytes) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_unchanged()) recipe_->check(bytes);
  }

  Tensor compute() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_unchanged()) return value_;
    const Tensor value = recipe_->compute();
    if (value.is_inference()) return value;  // whose versions nobody counts
    value_ = value;
    version_ = value._version();
    return value;
  }

  Tensor take() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool has_value = is_unchanged();
    const Tensor value = std::exchange(value_, Tensor());
    return has_value ? value : recipe_->compute();
  }

 private:
  // Whoever reads a node's saved tensors is given the value itself.
  bool is_unchanged() const { return value_.defined() && value_._version() == version_; }

  const RecipePtr recipe_;
  mutable std::mutex mutex_;
  mutable Tensor value_;
  mutable uint32_t version_ = 0;
};

}  // namespace

std::optional<Rows> rows_of(const Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return Rows{1, tensor.numel(), tensor.numel()};
  std::vector<std::pair<int64_t, int64_t>> dims;  // strides and sizes
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dims.begin(), dims.end());
  Rows rows{1, 1, 0};
  size_t i = 0;
  for (; i < dims.size() && dims[i].first == rows.length; ++i) rows.length *= dims[i].second;
  if (i == 0 || i == dims.size() || dims[i].first < rows.length) return std::nullopt;
  rows.stride = dims[i].first;
  for (; i < dims.size(); ++i) {
    if (dims[i].first != rows.count * rows.stride) return std::nullopt;
    rows.count *= dims[i].second;
  }
  return rows;
}

bool is_in_memory(const Tensor& tensor) {
  // Zeros of forward-mode AD have no memory, a negative view has the other sign there.
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet elsewhere({Key::Python, Key::ZeroTensor, Key::Negative, Key::Conjugate});
  if (!tensor.device().is_cpu() || tensor.key_set().has_any(elsewhere) || !tensor.has_storage() ||
      !tensor.storage().device().is_cpu()) {
    return false;
  }
  const auto rows = rows_of(tensor);
  if (!rows) return false;
  const int64_t end = tensor.storage_offset() + (rows->count - 1) * rows->stride + rows->length;
  return tensor.storage().nbytes() >= static_cast<size_t>(end) * tensor.element_size();
}

// tensor_data is detach without the way through the dispatcher: the copy has the same versions.
Held::Held(const Tensor& tensor)
    : tensor_(tensor.tensor_data()), original_(tensor.getIntrusivePtr()), version_(tensor_._version()) {}

void Held::hold() {
  if (is_in_memory(tensor_)) content_ = content_of(tensor_);
}

void Held::check(bool bytes) const {
  if (tensor_._version() != version_) raise_as_torch();
  if (!bytes) return;
  TORCH_CHECK(is_in_memory(tensor_) && content_of(tensor_) == content_,
              "one of the variables needed for gradient computation has been written to, or its memory released, in a "
              "way that autograd does not see (.data, numpy, its storage): [",
              tensor_.toString(), " ", tensor_.sizes(),
              "]. The operand of an operator behind it is kept as a recipe of freezekit's, which reads it.");
}

// Of a twin that torch saves and whose version then moves: so torch words it, and adds what made the tensor and a hint.
void Held::raise_as_torch() const {
  namespace variable = torch::autograd::impl;
  const Unseen unseen;
  const auto alive = original_.lock();
  const Tensor original = alive ? Tensor(alive) : tensor_;
  const Tensor twin = original.is_leaf() ? torch::autograd::make_variable(tensor_)
                                         : torch::autograd::make_variable(tensor_, variable::gradient_edge(original));
  variable::set_version_counter(twin, c10::VariableVersion(version_));
  const torch::autograd::SavedVariable saved(twin, /*is_output=*/false);
  variable::set_version_counter(twin, c10::VariableVersion(tensor_._version()));
  saved.unpack();
  TORCH_INTERNAL_ASSERT(false, "torch takes a tensor that was written to");
}

Tensor copy_of(const Tensor& vector) {
  if (!vector.defined()) return vector;
  if (!is_in_memory(vector) || !vector.is_contiguous()) return unrecorded([&] { return vector.clone(); });
  const Tensor copy = empty_beside(vector, vector.sym_sizes(), at::MemoryFormat::Contiguous, vector.scalar_type());
  std::memcpy(copy.mutable_data_ptr(), vector.const_data_ptr(), vector.numel() * vector.element_size());
  return copy;
}

Vector::Vector(const Tensor& tensor)
    : storage_(tensor.storage().getWeakStorageImpl()), offset_(tensor.storage_offset()), size_(tensor.numel()),
      dtype_(tensor.dtype()) {}

Tensor Vector::tensor() const {
  auto storage = storage_.lock();
  if (!storage) return {};
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype_);
  result.unsafeGetTensorImpl()->set_storage_offset(offset_);
  result.unsafeGetTensorImpl()->set_sizes_contiguous(size_);
  return result;
}

namespace {

// Null where the scales and shifts would weigh more than half of what is saved, and for layouts and dtypes that torch
// computes otherwise.
std::shared_ptr<Recipe> affine_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                    const Tensor& rstd, int64_t width) {
  if (x.numel() < 4 * x.size(0) * x.size(1)) return nullptr;
  if (!x.is_contiguous() && !x.is_contiguous(x.suggest_memory_format())) return nullptr;
  if (x.scalar_type() == at::kFloat) {
    return std::make_shared<AffineNorm<float>>(x, weight, bias, mean, rstd, width);
  }
  return std::make_shared<AffineNorm<double>>(x, weight, bias, mean, rstd, width);
}

// Whether all are of x's dtype, which is float or double.
bool are_alike(const Tensor& x, std::initializer_list<const Tensor*> others) {
  const auto is_alike = [&](const Tensor* t) { return !t->defined() || t->scalar_type() == x.scalar_type(); };
  return is_affine_type(x.scalar_type()) && std::all_of(others.begin(), others.end(), is_alike);
}

// Whether each is undefined, or a contiguous vector of that length, with values if there are any.
bool are_vectors(std::initializer_list<const Tensor*> vectors, int64_t length, bool has_data) {
  return std::all_of(vectors.begin(), vectors.end(), [&](const Tensor* t) {
    return !t->defined() ||
           (t->dim() == 1 && t->size(0) == length && t->is_contiguous() && (!has_data || is_in_memory(*t)));
  });
}

// x with other sizes: its bytes and its version. x is contiguous.
Tensor seen_as(const Tensor& x, at::IntArrayRef size) {
  const Tensor seen = unrecorded([&] { return x.view(size); });
  torch::autograd::impl::set_version_counter(seen, torch::autograd::impl::version_counter(x));
  return seen;
}

// As it was before it was expanded, which operators that broadcast take as well; with its version.
Tensor unexpanded(const Tensor& x) {
  std::vector<int64_t> size = x.sizes().vec();
  for (size_t i = 0; i < size.size(); ++i) {
    if (x.stride(i) == 0) size[i] = std::min<int64_t>(size[i], 1);
  }
  if (x.sizes() == size) return x;
  const Tensor seen = unrecorded([&] { return x.as_strided(size, x.strides()); });
  torch::autograd::impl::set_version_counter(seen, torch::autograd::impl::version_counter(x));
  return seen;
}

}  // namespace

std::shared_ptr<Recipe> group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& rstd, double eps, bool has_data) {
  if (x.dim() < 2 || x.numel() == 0 || (has_data && !is_in_memory(x))) return nullptr;
  const int64_t n = x.size(0), c = x.size(1);
  const bool are_statistics =
      mean.dim() == 2 && mean.size(0) == n && mean.sizes() == rstd.sizes() && mean.size(1) > 0 && c % mean.size(1) == 0;
  if (!are_statistics || !are_vectors({&weight, &bias}, c, has_data)) return nullptr;
  for (const Tensor* vector : {&mean, &rstd}) {
    if (!vector->is_contiguous() || (has_data && !is_in_memory(*vector))) return nullptr;
  }
  // Without parameters torch's formula is another.
  if ((weight.defined() || bias.defined()) && are_alike(x, {&mean, &rstd, &weight, &bias})) {
    return affine_norm(x, weight, bias, mean, rstd, c / mean.size(1));
  }
  // Torch rounds the statistics of low precision: they are computed again. In channels_last, torch's sums depend on the
  // number of threads.
  if (!x.is_contiguous() || x.numel() < 4 * n * c) return nullptr;
  const Tensor w = copy_of(weight), b = copy_of(bias);
  return std::make_shared<FormulaOf>(
      std::vector<Held>{Held(x)},
      [w, b, n, c, eps, length = x.numel() / (n * c), groups = mean.size(1)](at::TensorList kept) {
        return std::get<0>(at::native_group_norm(kept[0], w, b, n, c, length, groups, eps));
      },
      std::vector<Tensor>{w, b});
}

bool is_affine_type(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

std::shared_ptr<Recipe> batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& rstd, at::IntArrayRef size, bool has_data) {
  if (x.dim() < 2 || x.numel() == 0 || (has_data && !is_in_memory(x))) return nullptr;
  const int64_t channels = x.size(1);
  if (!are_vectors({&weight, &bias, &mean, &rstd}, channels, has_data) ||
      !are_alike(x, {&weight, &bias, &mean, &rstd})) {
    return nullptr;
  }
  if (x.sizes() == size) return affine_norm(x, weight, bias, mean, rstd, 1);
  // Instance norm is a batch norm of one image with all channels of all images.
  const bool are_instances = size.size() >= 2 && x.size(0) == 1 && size[0] * size[1] == channels && x.is_contiguous() &&
                             c10::multiply_integers(size) == x.numel();
  return are_instances ? affine_norm(seen_as(x, size), weight, bias, mean, rstd, 1) : nullptr;
}

std::shared_ptr<Recipe> layer_norm(const Tensor& x, at::IntArrayRef shape, const Tensor& weight, const Tensor& bias,
                                   double eps, bool has_data) {
  const auto bytes_of = [](const Tensor& tensor) { return tensor.defined() ? tensor.nbytes() : 0; };
  // The copies weigh at most half of what is saved.
  if (x.numel() == 0 || !x.is_contiguous() || x.nbytes() < 2 * (bytes_of(weight) + bytes_of(bias))) return nullptr;
  for (const Tensor* tensor : {&x, &weight, &bias}) {
    if (has_data && tensor->defined() && !is_in_memory(*tensor)) return nullptr;
  }
  return std::make_shared<LayerNorm>(x, shape, weight, bias, eps);
}

std::shared_ptr<Recipe> function_of(const Tensor& x, Function f, bool has_data) {
  if (has_data ? !is_in_memory(x) : !rows_of(x)) return nullptr;
  return std::make_shared<FunctionOf<Held>>(Held(x), std::move(f));
}

std::shared_ptr<Recipe> function_of(RecipePtr x, Function f) {
  return std::make_shared<FunctionOf<RecipePtr>>(std::move(x), std::move(f));
}

std::shared_ptr<Recipe> formula_of(const std::vector<Tensor>& kept, Formula f, bool has_data) {
  if (kept.size() == 1) {
    return function_of(kept[0], {[f = std::move(f)](const Tensor& x) { return f(x); }}, has_data);
  }
  std::vector<Held> held;
  for (const Tensor& tensor : kept) {
    held.emplace_back(unexpanded(tensor));
    if (has_data && !is_in_memory(held.back().tensor())) return nullptr;
  }
  return std::make_shared<FormulaOf>(std::move(held), std::move(f));
}

bool is_all_of(const Tensor& view, const Tensor& base) {
  return view.is_contiguous() && base.is_contiguous() && view.sym_numel() == base.sym_numel() &&
         view.scalar_type() == base.scalar_type() && view.sym_storage_offset() == base.sym_storage_offset();
}

RecipePtr seen_as(RecipePtr recipe, const Tensor& view) {
  return std::make_shared<Seen>(std::move(recipe), view.sym_sizes());
}

std::shared_ptr<Recipe> shared(RecipePtr recipe) { return std::make_shared<Shared>(std::move(recipe)); }

}  // namespace freezekit::chain
