// A tensor that a node keeps for its backward pass, through whatever saved-tensor hooks are set.
//
// Bits and taps are not numbers. A hook that casts all that it sees (to save memory, or to move it faster) rounds the
// activations that stock keeps, and would turn words of 32 bits into others. So hooks are shown bytes, which float16 and
// bfloat16 hold exactly, and what they give back is held against a checksum: it is right, or it is an error.
//
// A checkpoint gives a node what another node kept in its second pass. Where something is switched between the passes, one
// of them keeps bits and the other what torch's formula reads, and a word of bits has the shape of a number. So checkpoints
// are shown bytes of a dtype that torch computes nothing with: its formulas raise, and a node of freezekit's that meets any
// other dtype or size does.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <optional>
#include <vector>

#include "torch/autograd/node.h"

namespace freezekit {

class KeptTensor {
 public:
  KeptTensor() = default;
  explicit KeptTensor(const at::Tensor&);
  // What its node makes itself. Such a tensor is unpacked for the node.
  static KeptTensor of_result(const at::Tensor&);

  at::Tensor unpack(AnyNodePtr node = {}) const;

  torch::autograd::SavedVariable variable;  // what hooks see, for the engine and compiled autograd
  bool is_result = false;

 private:
  // What was shown as bytes; to a checkpoint without a checksum.
  struct Original {
    at::ScalarType dtype;
    std::vector<int64_t> size, stride;
    at::Device device;
    std::optional<at::Tensor> checksum;
  };
  std::unique_ptr<const Original> original_;
};

}  // namespace freezekit
