// The recipes that there are, before they hold what they read. None of them holds a graph.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "cpu/sigmoid.h"
#include "torch/chains/chain.h"

namespace freezekit::chain {

// Elements of a tensor in memory: rows of contiguous ones, as far apart from row to row. A dense tensor is one row, and
// half of one, as chunk gives it, has many.
struct Rows {
  int64_t count, length, stride;
};
std::optional<Rows> rows_of(const Tensor& tensor);

// Whether there are bytes on this machine behind every element, in rows.
bool is_in_memory(const Tensor& tensor);

// A tensor with its version, as autograd's SavedVariable, and a hash of its bytes, if it has any.
class Held {
 public:
  explicit Held(const Tensor& tensor);
  void hold();
  void check(bool bytes) const;
  const Tensor& tensor() const { return tensor_; }

 private:
  [[noreturn]] void raise_as_torch() const;

  Tensor tensor_;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> original_;
  uint32_t version_;
  uint64_t content_ = 0;
};

// A vector's values as they are now. Beside a tiny norm, torch's operator for it takes a good part of the time.
Tensor copy_of(const Tensor& vector);

// A contiguous vector, as long as its memory exists. It holds no reference to the tensor: torch swaps a tensor only while
// nobody else holds it.
class Vector {
 public:
  explicit Vector(const Tensor& tensor);
  Tensor tensor() const;  // undefined where the memory is gone

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  int64_t offset_, size_;
  caffe2::TypeMeta dtype_;
};

// Of a group norm: x, mean and rstd of (N, groups) as its node keeps them, weight and bias of (C,) as they are now, which
// may be undefined. Null for what is not computed here.
std::shared_ptr<Recipe> group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& rstd, double eps, bool has_data);

// Of a batch norm by the statistics of x, over (N, C, ...): mean and rstd of (C,) as its node keeps them. Its result has been
// given other sizes where `size` is not x's, as that of instance norm.
std::shared_ptr<Recipe> batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& rstd, at::IntArrayRef size, bool has_data);
// Whether x * scale + shift in its own arithmetic is what torch computes.
bool is_affine_type(at::ScalarType dtype);

// Of a layer norm of any dtype: weight and bias as they are now, which may be undefined. Null for what is not computed here.
std::shared_ptr<Recipe> layer_norm(const Tensor& x, at::IntArrayRef shape, const Tensor& weight, const Tensor& bias,
                                   double eps, bool has_data);

// By torch's operators, and as what freezekit computes in less time. Of both, one may do: the trial tells.
struct Function {
  std::function<Tensor(const Tensor&)> torchs = {};
  std::optional<cpu::Sigmoid> own = {};
};

// f(x), of a tensor that is kept or of what another recipe gives.
std::shared_ptr<Recipe> function_of(const Tensor& x, Function f, bool has_data);
std::shared_ptr<Recipe> function_of(RecipePtr x, Function f);

using Formula = std::function<Tensor(at::TensorList)>;

// f(kept), by torch's elementwise operators, of tensors that broadcast.
std::shared_ptr<Recipe> formula_of(const std::vector<Tensor>& kept, Formula f, bool has_data);

// What two nodes ask for in a backward pass, one soon after the other: computed for the first, it is there for the second.
std::shared_ptr<Recipe> shared(RecipePtr recipe);

}  // namespace freezekit::chain
