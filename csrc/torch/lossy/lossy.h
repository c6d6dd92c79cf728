// Smooth activations whose derivative is kept in 8 or 4 bits where torch keeps their input: opt-in, since gradients are
// others than stock's.
//
//   forward   y = f(x), torch's own result; codes of f'(x), as csrc/cpu/smooth.h has them
//   backward  dx = dy * d,  |d - f'(x)| <= unit / (2 * steps) + rounding
//
// There is no second derivative of it: a backward pass under create_graph is an error.
//
// Where a product reads y, that is kept as well, as in torch: there an exact chain keeps x alone (torch/chains), and less.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

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

// The result of `compute`, torch's operator below autograd, with a node that keeps codes.
Tensor record(const Tensor& x, const Activation&, int bits, c10::function_ref<Tensor()> compute);
// Of a call in place.
void record_(Tensor& x, const Activation&, int bits, c10::function_ref<void()> compute);

// Whether a hook on saved tensors is being shown codes.
bool is_shown();

}  // namespace freezekit::lossy
