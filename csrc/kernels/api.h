// The only door to the kernels: no torch, raw pointers, a problem, a stream.
//
// Layouts: activations NHWC, filters KRSC, outputs NPQK, all dense; groups split C and K into consecutive runs.
// dtype of x, filter and y (or their gradients) is one and the same; accumulation is fp32 (fp64 for fp64).
// Nothing here allocates, synchronises, prints or reads the environment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/pooling.h"
#include "core/problem.h"

namespace freezekit {

enum class Status : int {
  success,
  unsupported,       // select() found no kernel: see Selection::reason
  invalid_argument,  // a null pointer or a misaligned one, a size that does not fit the kernel
  launch_failed,     // the driver refused; error() of the device holds the cause
};

const char* to_string(Status);

// What is known of the device and of the caller's settings; everything that a choice may depend on.
struct Target {
  int sm = 0;                  // compute capability, 80 for sm_80; the emulator is 80
  int sm_count = 0;            // multiprocessors
  bool allow_tf32 = false;     // fp32 inputs may be rounded to tf32
  bool deterministic = false;  // results must repeat bit for bit
  bool hopper = false;         // on sm_90 the Hopper family may be chosen: on request, since it has not run on one yet
  bool has_code = true;        // this build has code that the device can run
};

enum class Family : int { none, direct, implicit_gemm, depthwise, hopper };

// Slices of a sum from which on eight threads share what one adds of fewer.
constexpr int kManySlices = 32;

// Which kernel runs, and why: printable data, not control flow. `config` indexes the family's own table of tiles.
struct Selection {
  Family family = Family::none;
  int config = 0;
  int split_k = 1;
  size_t workspace_bytes = 0;
  const char* kernel = "";  // static storage
  const char* reason = "";  // static storage
};

// A pure host function: same arguments, same answer, no device needed.
Selection select(Operator, const Conv2dProblem&, DType, const Target&);

// Applied to the accumulators in this order: * scale, + bias, + residual, ReLU and its upper end, mask. Members that are null do
// nothing.
// Mask words hold 32 consecutive elements of the output in memory order (NHWC), bit i of word j is element 32 * j + i;
// a mask has ceil(numel / 32) words, the unused bits of the last one 0. mask_out bit = !(v <= 0 || v >= relu_end), v the
// value before ReLU rounded to the tensors' dtype: both ends give 0 and a NaN gives 1, as torch's own gradient. Under
// mask_in, bit 0 stores 0.
struct Epilogue {
  const void* scale = nullptr;     // K (fprop) or C (dgrad) elements of the accumulators' type: f32, f64 for f64
  const void* bias = nullptr;      // K (fprop) or C (dgrad) elements of the tensors' dtype
  bool wide_bias = false;          // or of the accumulators'
  const void* residual = nullptr;  // as the output
  bool relu = false;
  float relu_end = std::numeric_limits<float>::infinity();  // above 0; 6 is ReLU6
  uint32_t* mask_out = nullptr;                             // needs relu
  const uint32_t* mask_in = nullptr;
};

// fprop reads x, filter and writes y; dgrad reads y (= dy), filter and writes x (= dx); wgrad reads y (= dy), x and
// writes filter (= dw). Every element of the output is written.
struct Conv2dTensors {
  void* x = nullptr;
  void* filter = nullptr;
  void* y = nullptr;
  // dgrad by tensor cores only: K factors of the accumulators' type, by which the filter is multiplied where W' is made.
  const void* filter_scale = nullptr;
};

using Stream = void*;  // a cudaStream_t; the emulator ignores it

Status launch_conv2d(Operator, const Selection&, const Conv2dProblem&, DType, const Conv2dTensors&, const Epilogue&,
                     void* workspace, Stream);

// db[k] = sum over rows of dy[row, k]; dy is rows x k, row-major; deterministic.
size_t bias_grad_workspace(int64_t rows, int64_t k, DType);
Status launch_bias_grad(const void* dy, void* db, int64_t rows, int64_t k, DType, void* workspace, Stream);

// K numbers.
struct ChannelVector {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// A batch norm with fixed statistics behind a convolution with a bias, as what it does to a channel:
//   scale = gamma / sqrt(var + eps);  shift = beta + (bias - mean) * scale
// in fp64, rounded once. gamma, beta, mean and bias may be null: 1, 0, 0, 0.
struct FixedNorm {
  ChannelVector mean, var, gamma, beta, bias;
  double eps = 0;
};

// `scale` and, unless it is null, `shift` get `channels` elements each, of what tensors of `dtype` accumulate in.
Status launch_norm_affine(const FixedNorm&, int64_t channels, DType dtype, void* scale, void* shift, Stream);

// A filter in another form in one pass: out = cast(filter * scale[k]), in layout KRSC, or CRSK under transposed
// (a group's C/G x R x S x K/G after another's), which is the W' that dgrad reads. The filter may have any strides.
// from -> to: the same type, or f32 -> f16 or bf16.
struct FilterTransform {
  DType from = DType::f32, to = DType::f32;
  bool transposed = false;
  int64_t stride_k = 0, stride_c = 0, stride_r = 0, stride_s = 0;  // of the filter, in elements
  const void* scale = nullptr;                                     // K elements of what `from` accumulates in; null: 1
};
Status launch_filter_transform(const Conv2dProblem&, const FilterTransform&, const void* filter, void* out, Stream);

// Activations that are linear in pieces: y, and the bit of each element where the slope is 1. In place or not.
//   relu: max(x, 0), x > 0 or NaN    hardtanh: min(max(x, a), b), a < x < b or NaN    leaky_relu: x > 0 ? x : a * x, x > 0
enum class ActivationKind : int { relu, hardtanh, leaky_relu };
struct PiecewiseActivation {
  ActivationKind kind = ActivationKind::relu;
  double a = 0, b = 0;
};
Status launch_activation(const PiecewiseActivation&, const void* x, void* y, uint32_t* bits, int64_t numel, DType,
                         Stream);

// Such an activation's gradient, and dropout: out = bit ? on * x : off * x, or bit ? x : 0 under select. In place or not.
struct Gate {
  bool select = true;
  double on = 1, off = 0;
};
Status launch_gate(const Gate&, const void* x, const uint32_t* bits, void* out, int64_t numel, DType, Stream);

// bit[i] = keep[i] != 0, of bytes.
Status launch_pack_bytes(const void* keep, uint32_t* bits, int64_t numel, Stream);

// Max pooling by taps r * kernel_w + s of each output's window, for a MaxPool that fits_int32 holds for. scatter: dx = the
// sums of dy at its taps, in the order of outputs; gather: y = the value at the tap, 0 for a tap outside.
Status launch_max_pool(const MaxPool&, DType, const void* x, void* y, void* taps, Stream);
Status launch_max_pool_scatter(const MaxPool&, DType, const void* dy, const void* taps, void* dx, Stream);
Status launch_max_pool_gather(const MaxPool&, DType, const void* x, const void* taps, void* y, Stream);

// Fills in what the current device is (sm, sm_count); the emulator's is a small sm_80.
Status current_target(Target*);

// Whether a CUDA graph is being captured on the stream; never under emulation.
bool is_capturing(Stream);

// What this thread's waits and allocations are to captures that are under way on other streams, of its own or of other
// threads: by default a fault that ends those. Returns what it was until now.
enum class CaptureMode : int { global, of_thread, relaxed };
CaptureMode exchange_capture_mode(CaptureMode);

// One build of the kernels: the nvcc one (device pointers) or the emulated one (host pointers).
struct KernelTable {
  decltype(&launch_conv2d) conv2d;
  decltype(&freezekit::bias_grad_workspace) bias_grad_bytes;
  decltype(&launch_bias_grad) bias_grad;
  decltype(&launch_filter_transform) filter_transform;
  decltype(&launch_norm_affine) norm_affine;
  decltype(&launch_activation) activation;
  decltype(&launch_gate) gate;
  decltype(&launch_pack_bytes) pack_bytes;
  decltype(&launch_max_pool) max_pool;
  decltype(&launch_max_pool_scatter) max_pool_scatter;
  decltype(&launch_max_pool_gather) max_pool_gather;
  decltype(&current_target) target;
  decltype(&freezekit::is_capturing) capturing;
  decltype(&freezekit::exchange_capture_mode) exchange_capture_mode;
};

}  // namespace freezekit

// Defined by each build of the kernels. The emulated one is a shared library of its own that exports only this.
extern "C" const freezekit::KernelTable* freezekit_kernel_table();
