// The only door to the kernels: no torch, raw pointers, a problem, a stream.
//
// Layouts: activations NHWC, filters KRSC, outputs NPQK, all dense; groups split C and K into consecutive runs.
// dtype of x, filter and y (or their gradients) is one and the same; accumulation is fp32 (fp64 for fp64).
// Nothing here allocates, synchronises, prints or reads the environment.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"

namespace freezekit {

enum class Status : int {
  success,
  unsupported,          // select() found no kernel: see Selection::reason
  invalid_argument,     // a null pointer or a misaligned one, a size that does not fit the kernel
  launch_failed,        // the driver refused; error() of the device holds the cause
};

const char* to_string(Status);

// What is known of the device and of the caller's settings; everything that a choice may depend on.
struct Target {
  int sm = 0;                   // compute capability, 80 for sm_80; the emulator is 80
  int sm_count = 0;             // multiprocessors
  bool allow_tf32 = false;      // fp32 inputs may be rounded to tf32
  bool deterministic = false;   // results must repeat bit for bit
};

enum class Family : int { none, direct, implicit_gemm, depthwise };

// Which kernel runs, and why: printable data, not control flow. `config` indexes the family's own table of tiles.
struct Selection {
  Family family = Family::none;
  int config = 0;
  int split_k = 1;
  size_t workspace_bytes = 0;
  const char* kernel = "";      // static storage
  const char* reason = "";      // static storage
};

// A pure host function: same arguments, same answer, no device needed.
Selection select(Operator, const Conv2dProblem&, DType, const Target&);

// Applied to the accumulators in this order: + bias, + residual, ReLU, mask. Members that are null do nothing.
// Mask words hold 32 consecutive elements of the output in memory order (NHWC), bit i of word j is element 32 * j + i;
// a mask has ceil(numel / 32) words. mask_out bit = (value before ReLU > 0). Under mask_in, bit 0 stores 0.
struct Epilogue {
  const void* bias = nullptr;       // K (fprop) or C (dgrad) elements of the tensors' dtype
  const void* residual = nullptr;   // as the output
  bool relu = false;
  uint32_t* mask_out = nullptr;     // needs relu
  const uint32_t* mask_in = nullptr;
};

// fprop reads x, filter and writes y; dgrad reads y (= dy), filter and writes x (= dx); wgrad reads y (= dy), x and
// writes filter (= dw). Every element of the output is written.
struct Conv2dTensors {
  void* x = nullptr;
  void* filter = nullptr;
  void* y = nullptr;
};

using Stream = void*;  // a cudaStream_t; the emulator ignores it

Status launch_conv2d(Operator, const Selection&, const Conv2dProblem&, DType, const Conv2dTensors&, const Epilogue&,
                     void* workspace, Stream);

// db[k] = sum over rows of dy[row, k]; dy is rows x k, row-major; deterministic.
size_t bias_grad_workspace(int64_t rows, int64_t k, DType);
Status launch_bias_grad(const void* dy, void* db, int64_t rows, int64_t k, DType, void* workspace, Stream);

// Fills in what the current device is (sm, sm_count); the emulator's is a small sm_80.
Status current_target(Target*);

// One build of the kernels: the nvcc one (device pointers) or the emulated one (host pointers).
struct KernelTable {
  decltype(&launch_conv2d) conv2d;
  decltype(&freezekit::bias_grad_workspace) bias_grad_bytes;
  decltype(&launch_bias_grad) bias_grad;
  decltype(&current_target) target;
};

}  // namespace freezekit

// Defined by each build of the kernels. The emulated one is a shared library of its own that exports only this.
extern "C" const freezekit::KernelTable* freezekit_kernel_table();
