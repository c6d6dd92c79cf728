// Backward of a frozen convolution, and how neighbouring ones share their passes.
//
// A node keeps bits and parameters (the weight, and gamma and var of a norm), no activation. In the backward pass it looks
// along the edge to the node that made its input:
//
//   - if that is a frozen convolution with bits, its bits go into this one's dgrad as the mask, in the same kernel;
//     the result is marked there, and the maker leaves out the pass that masks its own dy. Whether a mark still holds
//     is asked of the tensor that arrives: a sum, a hook's result or an edited tensor is not the marked one, and is
//     masked (again, which does no harm). So it does not matter what else reads the maker's output.
//   - no mask is lent where something looks at that gradient (a hook, retain_grad, autograd.grad for it): dL/dy of an
//     activation is not zero where the activation is.
//
// Under create_graph nothing is shared, and gradients are functions of what stock's are, by links (autograd/formula.h).
//
// A trainable convolution behind keeps the result itself. What torch's ReLU reads costs nothing then, bits would come on
// top: a node that is told so (will_be_kept) lets go of them.
//
// A node may have a second output, the input handed on to its other readers: what flows back to them is added in
// dgrad's epilogue, where autograd would sum in a pass of its own.
#pragma once

#include <optional>
#include <vector>

#include "torch/autograd/formula.h"
#include "torch/bits/gate.h"
#include "torch/frozen_conv2d/frozen_conv2d.h"

namespace freezekit {

// The gradients as a function of values alone, which knows no neighbours.
struct FrozenGradients {
  enum Keeps : size_t { kWeight, kGamma, kVar, kBits, kResult, kKept };

  Geometry geometry;
  std::vector<c10::SymInt> input_size, bits_stride;
  double eps = 0;
  bool has_norm = false, has_bits = false, has_result = false;

  auto fields() {
    Geometry& g = geometry;
    return std::tie(g.stride, g.padding, g.dilation, g.groups, g.backend, input_size, bits_stride, eps, has_norm,
                    has_bits, has_result);
  }
  variable_list of_all(const variable_list& grads, Kept, const Wanted&) const;

  // What is kept of a norm.
  FixedNormTensors norm(Kept) const;
  // dx of differentiable operators; masks are applied where they were made.
  Tensor input_gradient(const Tensor& dy, const Tensor& weight, const FixedNormTensors&, const Tensor& passed) const;
};

// Edges: the input and, where there is one, the residual.
class FrozenConv2dBackward : public CompiledNode<FrozenGradients> {
 public:
  FrozenConv2dBackward(const FrozenConv2d& f, SymIntArrayRef input_size, bool dx_is_channels_last, const Tensor& weight,
                       const FixedNormTensors&);

  // After the forward pass: the bits and their layout.
  void keep_bits(const Tensor& y, const Tensor& bits);

  // The result will be kept by another: bits are no longer needed, if nothing has happened to it and them.
  void keep_result(const Tensor& y);

  void release_variables() override;
  variable_list apply(variable_list&& grads) override;

 private:
  variable_list apply_recording(const variable_list& grads);
  AnyNodePtr before_activation(const Tensor& dy, const Tensor& weight, const FixedNormTensors&) const;
  Tensor masked(Tensor&& dy);
  Tensor input_gradient(const Tensor& dy, const Tensor& grad_mask, const Tensor& passed);
  FixedNormTensors norm();
  bool owns_kernels() const { return is_own(formula_.geometry.backend); }
  FrozenConv2dBackward* maker_of_input() const;
  Tensor lend();
  void mark(const Tensor& grad);
  bool is_marked(const Tensor& grad) const;
  bool may_write(const Tensor& dy) const;

  FrozenConv2d::Activation activation_;
  bool dx_is_channels_last_ = false, bits_are_channels_last_ = false, masks_in_dgrad_ = false;
  const void* made_ = nullptr;  // the storage of the result, and its version
  uint32_t made_version_ = 0;
  Operand operand_;  // what torch's activation reads in its backward pass
  std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> masked_;
  uint32_t masked_version_ = 0;
};

// Says that an operator which follows keeps this tensor for its own backward pass.
void will_be_kept(const Tensor&);

}  // namespace freezekit
