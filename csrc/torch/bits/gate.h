// One bit an element: where an activation or a dropout let a value through, packed as core/mask.h says.
//
// Bits lie in the memory order of a dense tensor, which its strides name. A gate is that mask as a linear map:
//   gate(x, bits, stride, on, off):  y[i] = bit[i] ? on * x[i] : off * x[i];   off = None selects 0, which stops NaN
// It is its own transpose, so its derivative of any order is itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "torch/autograd/formula.h"
#include "torch/common/operators.h"

namespace freezekit {

struct GateRule {
  double on = 1;
  std::optional<double> off;
};

Tensor gate(const Tensor& input, const Tensor& bits, SymIntArrayRef stride, const GateRule&, std::string_view backend);

// Makes `node` keep `bits` as the gate that its gradient goes through.
Settings gate_settings(SymIntArrayRef stride, const GateRule&, std::string_view backend);
variable_list gate_backward(const Tensor& grad, const variable_list& kept, const Settings&,
                            const std::vector<bool>& wanted);

// int32 words for one bit an element of `like`.
Tensor empty_bits(const Tensor& like);
// The bits of a dense bool tensor in its memory order, by ATen: for devices and transforms that have no kernel here.
Tensor pack_bits(const Tensor& mask);

// `input` as a tensor without gaps or overlaps, in the memory order that torch's elementwise operators give results.
Tensor dense(const Tensor& input);

// The strides of dense(input).
std::vector<c10::SymInt> dense_strides(const Tensor& input);

// Bit = (input > 0) of a dense tensor without NaN.
Tensor positive_bits(const Tensor& input, std::string_view backend);

// gate() on the storage of a dense tensor, whose memory order is that of bits.
void gate_inplace(const Tensor& dense, const Tensor& bits, const GateRule&, std::string_view backend);

// What computes on a tensor with data: the C++ kernels of the CPU, freezekit's own for GPUs (which the emulator also runs
// on CPU tensors), or ATen, on devices that have neither and where it is asked for on a GPU. Throws where `backend`
// demands what cannot be.
enum class Computer { cpu, kernels, aten };
Computer computer_for(const Tensor&, std::string_view backend);

// Throws where `backend` demands kernels: only torch's formulas serve what the caller has met.
void check_aten_is_allowed(std::string_view backend);

// Whether torch's own operator computes a call: its formulas serve where no node of ours can, and where no gradient is
// wanted there is nothing to keep. Throws where `backend` demands kernels and only the formulas serve.
bool is_aten_s(const Tensor& input, std::string_view backend);

}  // namespace freezekit
