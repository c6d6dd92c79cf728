// Makes a gradient a function of all that stock's is a function of; see Link in formula.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

namespace freezekit {

// Backward the edges `to` receive zeros of the gradient's size, or nothing. `lasting`: so do gradients of it.
at::Tensor linked(const at::Tensor& gradient, const torch::autograd::edge_list& to, bool zeros, bool lasting);

}  // namespace freezekit
