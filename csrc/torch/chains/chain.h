// One tensor per chain: what torch's graph keeps although it can be computed again, cheaply, from what it keeps anyway.
//
// An activation keeps its input. Where a norm made that, whose own input is kept for the norm's gradient, there are two
// tensors and one would do. So torch's node stays as it is, and what it saved is replaced by a recipe:
//
//   operator              what made its operand        the operand's recipe
//   silu, gelu, ...       group norm, batch norm by    x * scale + shift, of the norm's input
//                         batch statistics, instance norm
//   silu, gelu, ...       layer norm                   the norm, of its input
//   product               silu, gelu, ...              the activation, of its input, or of its input's recipe
//   product, power, mse   sigmoid, difference, ...     the formula, of tensors that nodes keep
//   convolution, Linear   all of these               the same, where the weight learns
//   matrix product        a quotient                   the quotient, of what its node keeps, moved as matmul does
//
// A recipe is kept only if it gives the operand's very bits: it is tried when it is kept. So nothing is assumed of who
// else wrote to the operand, by which way, and nothing of how torch rounds. What a recipe reads is held with its version,
// as autograd holds what it saved, and with a hash of its bytes: a write that no version counts is an error in backward,
// and no wrong value.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace freezekit::chain {

using at::Tensor;

class Recipe {
 public:
  virtual ~Recipe() = default;
  // Whether `value` has the bits and the strides of what compute gives.
  virtual bool gives(const Tensor& value) const = 0;
  // From here on what is read must stay as it is.
  virtual void hold() = 0;
  // Raises where it did not: as the versions tell, and with `bytes` the bytes too.
  virtual void check(bool bytes) const = 0;
  // Of what it reads as that is now.
  virtual Tensor compute() const = 0;
  // For the last node that asks for it in a backward pass.
  virtual Tensor take() const { return compute(); }
  // The tensors that are kept for it.
  virtual std::vector<Tensor> reads() const = 0;
};

using RecipePtr = std::shared_ptr<const Recipe>;

// Who made an operand. Recipes go no deeper: an activation's operand comes from a norm, a product's from an activation.
// A formula is of tensors that are kept themselves; a quotient too, whose elements then have been given other places.
enum class Maker { norm, activation, formula, moved_quotient };

// Whether `value` is large enough for a recipe: 8 KiB. Of fewer bytes torch's node keeps its operand. Tensors of unknown size
// are large.
bool is_large(const Tensor& value);
// For tests, which are to meet recipes of any size. Returns what it was before.
int64_t set_least_bytes(int64_t bytes);

// Whether a node of such an operator of torch's is behind `value`. Most values have none: it is the first thing to ask.
bool has_maker(const Tensor& value, Maker maker);

// A recipe that gives `value`, which has such a maker; null where there is none, and where hooks of others see what is
// saved: checkpoints count it, offloading takes it away. `watched`: the hooks are freezekit's own, and so may be the
// stand-ins for tensors, which have no data to try a recipe on. `beside`: a tensor that the node will keep, from which a
// formula may start, or an undefined one.
RecipePtr recipe_for(const Tensor& value, Maker maker, bool watched, const Tensor& beside = Tensor());

// Whether a view has all elements of its base in the same order: both are contiguous.
bool is_all_of(const Tensor& view, const Tensor& base);
// What gives the base gives such a view.
RecipePtr seen_as(RecipePtr recipe, const Tensor& view);

// While torch's kernel makes a node whose operands have recipes: no hook is to see what is not kept.
class Unseen {
 public:
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;

 private:
  bool before_;
};

enum class Slot { self, other };  // of a node, as torch names them

// Of the node of `result`, which torch's kernel has just made within Unseen: the operand is not kept where there is a
// recipe, and hooks see what that reads; else they see the operand after all, which may be the result itself.
void keep(const Tensor& result, Slot slot, const Tensor& operand, const RecipePtr& recipe);

// Of a power's node, which keeps its operand: formulas may start from it.
void note_power(const Tensor& result);

// Whether a hook of this thread is being shown what a recipe reads.
bool is_for_recipe();

// Whether a hook of this thread is being shown what a node has kept so far, and keeps no more.
bool is_let_go();

// Of the sum of a tensor and a number, as Python writes it: torch's node does not keep the number.
void note_number(const Tensor& result, const Tensor& number);

// Torch's nodes of norms do not keep eps, and those of group and batch norms do not keep the bias: eps is noted, and where
// the bias is, or what it was. Should it move before there is a recipe, there will be none.
void note_norm(const Tensor& result, const Tensor& bias, double eps);

}  // namespace freezekit::chain
