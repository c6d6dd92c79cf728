// Smooth activations whose derivative is kept in 8 or 4 bits where torch keeps their input: opt-in, since gradients are
// others than stock's.
//
//   forward   y = f(x), torch's own result; codes of f'(x), as csrc/cpu/smooth.h has them
//   backward  dx = dy * d,  |d - f'(x)| <= unit / (2 * steps) + rounding
//
// There is no second derivative of it: a backward pass under create_graph is an error.
//
// Where a product reads y, it would keep y besides, and x alone would do for both (torch/chains). Nobody knows what will
// read y. So x is held until y is gone or the next activation comes, and a product that takes it up makes the node exact.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <optional>

namespace freezekit::lossy {

using at::Tensor;

// How many bits of a derivative are kept, in the process: 8, 4, or 0, which leaves all activations exact.
void set_bits(int bits);
int bits();

enum class Kind : int8_t { silu, gelu, gelu_tanh, mish, hardswish, softplus, elu };

struct Activation {
  Kind kind;
  // softplus: beta, threshold; elu: alpha, scale, input_scale.
  double a = 0, b = 0, c = 0;
};

// Whether codes of the derivative at x take less than x does, of an activation whose gradient is recorded. Raises where
// they would, and there is no kernel that makes them.
bool gains(const Tensor& x, const Activation&, int bits);

// The result of `stock`, torch's operator within chain::Unseen, in place or not. Its node is replaced by one that keeps
// codes, and torch's with x as long as a product may come.
Tensor record_beside(const Tensor& x, const Activation&, int bits, c10::function_ref<Tensor()> stock);
// A product has made a recipe of what torch's node of `value` keeps: if codes stand for that, they do no more.
void take_up(const Tensor& value);
// Lets go of an x whose y is gone: to be called whenever operators are.
void let_go();

// The same for good: the result of `compute`, torch's operator below autograd.
Tensor record(const Tensor& x, const Activation&, int bits, c10::function_ref<Tensor()> compute);
// Of a call in place.
void record_(Tensor& x, const Activation&, int bits, c10::function_ref<void()> compute);

// Whether a hook on saved tensors is being shown codes, and whether it is such as are kept no more.
bool is_shown();
bool is_let_go();

}  // namespace freezekit::lossy
