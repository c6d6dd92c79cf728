// The three operators by freezekit's own kernels: CUDA ones on a GPU, the emulated build of the same source on a CPU.
#pragma once

#include <limits>
#include <tuple>

#include "kernels/api.h"
#include "torch/backends/kernel_library.h"
#include "torch/common/operators.h"

namespace freezekit::native {

// Whether calls that demand `native` or `emulated` may run the Hopper family: on a GPU of sm_90, or emulated as one.
void set_hopper(bool allowed);

// In this scope the calling thread's launches may or may not, whatever is demanded: `auto` has decided.
class HopperScope {
 public:
  explicit HopperScope(bool allowed);
  ~HopperScope();
  HopperScope(const HopperScope&) = delete;
  HopperScope& operator=(const HopperScope&) = delete;

 private:
  std::optional<bool> outer_;
};

// Within it this thread's convolutions run that kernel, whatever select() would take: a proof's (rehearsals.h).
class SelectionScope {
 public:
  explicit SelectionScope(const Selection&);
  ~SelectionScope();
  SelectionScope(const SelectionScope&) = delete;
  SelectionScope& operator=(const SelectionScope&) = delete;

 private:
  const Selection* outer_;
};

// The current device and torch's settings, as a choice of kernel needs them; none, or an error, where the device cannot
// be asked.
std::optional<Target> find_target(const KernelLibrary&, Backend);
Target target_on(const KernelLibrary&, Backend);

// What a launch needs of torch.
std::optional<DType> dtype_of(at::ScalarType);
Stream stream_of(const Tensor& on);
// Whether a CUDA graph is being captured there.
bool is_capturing(const Tensor& on, Backend);
void check_status(Status, const char* kernel, const KernelLibrary&);

// The same; throws for dtypes that kernels do not compute with.
DType kernel_dtype(const Tensor&);

// scale and shift (K) of the norm behind a convolution, of what tensors of `like`'s dtype accumulate in; undefined parts
// of the norm and an undefined bias do nothing.
std::tuple<Tensor, Tensor> norm_affine(const FixedNormTensors&, const Tensor& bias, const Tensor& like, Backend);

// What is copied at once where the tensors are not in NHWC: most of it is still in a GPU's second cache when it is read again.
// A wgrad copies its operands whole.
constexpr int64_t kCopiedBytes = 32 << 20;

Tensor conv2d(const Conv2dProblem&, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const Geometry&);
Tensor dgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight, const Geometry&);
Tensor wgrad(const Conv2dProblem&, const Tensor& grad_output, const Tensor& input, const Geometry&);
Tensor bias_grad(const Tensor& grad_output, Backend);

// What fprop does to its sums before they are stored: * scale, + bias (of the tensors' dtype, or float32 beside a shorter one),
// + residual, ReLU up to `relu_end`, whose bits go to `mask_out`. Undefined tensors do nothing.
struct Finish {
  Tensor scale, bias, residual;
  bool relu = false;
  float relu_end = std::numeric_limits<float>::infinity();
  Tensor mask_out;
};

// With the kernels' epilogue, results in `format`; masks are in NHWC order. dgrad multiplies the filter by `scale` (K)
// first, where that is defined, adds `residual`, then applies `mask_in`.
Tensor conv2d_epilogue(const Conv2dProblem&, const Tensor& input, const Tensor& weight, const Finish&, const Geometry&,
                       at::MemoryFormat format);
Tensor dgrad_epilogue(const Conv2dProblem&, const Tensor& grad_output, const Tensor& weight, const Tensor& scale,
                      const Tensor& residual, const Tensor& mask_in, const Geometry&, at::MemoryFormat format);

}  // namespace freezekit::native
