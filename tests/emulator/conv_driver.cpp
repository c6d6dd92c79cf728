// Runs convolutions through the kernels' table and compares every bit with conv_reference.
//
//   driver SEED CP_ASYNC CASE...   CASE: operator,dtype,family,config,split_k,epilogue,allow_tf32,and 16 sizes;
//   family -1 takes what select() chooses, its config and split_k with it
//
// Operands are small integers, so that sums are exact and equality can be. Outputs and workspaces start as NaN, heap
// blocks are of the exact size. Exit code 1: wrong values; 3: a launch failed; 4: ldmatrix met bank conflicts.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/api.h"
#include "kernels/device.h"
#include "tests/emulator/conv_reference.h"

using namespace freezekit;

extern "C" void freezekit_emulator_set_seed(unsigned);
extern "C" bool freezekit_emulator_set_cp_async(const char*);
extern "C" uint64_t freezekit_emulator_counter(const char*);

namespace {

enum EpilogueBits { kBias = 1, kResidual = 2, kRelu = 4, kMaskOut = 8, kMaskIn = 16 };

struct Case {
  Operator op;
  DType dtype;
  int family, config, split_k, epilogue, allow_tf32;
  Conv2dProblem problem;
};

Case parse(const char* text) {
  std::vector<int64_t> v;
  for (char* at = const_cast<char*>(text); *at; at += *at == ',') v.push_back(std::strtoll(at, &at, 10));
  if (v.size() != 23) std::fprintf(stderr, "a case has 23 numbers, got %zu\n", v.size()), std::exit(2);
  Case c{static_cast<Operator>(v[0]), static_cast<DType>(v[1]), static_cast<int>(v[2]), static_cast<int>(v[3]),
         static_cast<int>(v[4]), static_cast<int>(v[5]), static_cast<int>(v[6]), {}};
  Conv2dProblem& p = c.problem;
  p.n = v[7], p.c = v[8], p.h = v[9], p.w = v[10], p.k = v[11], p.r = v[12], p.s = v[13], p.p = v[14], p.q = v[15];
  p.pad_h = v[16], p.pad_w = v[17], p.stride_h = v[18], p.stride_w = v[19], p.dilation_h = v[20], p.dilation_w = v[21];
  p.groups = v[22];
  return c;
}

uint32_t random_state = 1;

int64_t random_below(int64_t bound) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int64_t>(random_state >> 8) % bound;
}

std::vector<double> random_integers(int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = static_cast<double>(random_below(5) - 2);
  return values;
}

// A heap block of its own, with what bytes a sanitizer must see beyond its end.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count), data_(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  explicit Array(const std::vector<double>& values) : Array(values.size()) {
    for (size_t i = 0; i < count_; i++) data_[i] = rounded(values[i]);
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }

  static T rounded(double value) {
    if constexpr (std::is_same_v<T, double>) {
      return value;
    } else {
      return cast<T>(static_cast<float>(value));
    }
  }

 private:
  size_t count_;
  T* data_;
};

template <class T>
double value_of(T v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    return cast<float>(v);
  }
}

// Of a forced family: slices of wgrad in the accumulator's type, or the implicit GEMM's W' for dgrad.
size_t workspace_bytes(const Case& c) {
  const int64_t accumulator = c.dtype == DType::f64 ? 8 : 4, filter = c.problem.filter_numel();
  if (c.op == Operator::wgrad) return static_cast<size_t>(c.split_k > 1 ? c.split_k * filter * accumulator : 0);
  const bool transposes = c.op == Operator::dgrad && c.family == static_cast<int>(Family::implicit_gemm);
  return static_cast<size_t>(transposes ? filter * size_of(c.dtype) : 0);
}

// Applies the epilogue to `expected` and fills the mask that the kernel must write.
std::vector<uint32_t> finish(const Case& c, std::vector<double>& expected, const std::vector<double>& bias,
                             const std::vector<double>& residual, const std::vector<uint32_t>& mask_in) {
  std::vector<uint32_t> mask((expected.size() + 31) / 32, 0);
  for (size_t i = 0; i < expected.size(); i++) {
    if (c.epilogue & kBias) expected[i] += bias[i % bias.size()];
    if (c.epilogue & kResidual) expected[i] += residual[i];
    if (expected[i] > 0) mask[i / 32] |= 1u << i % 32;
    if ((c.epilogue & kRelu) && !(expected[i] > 0)) expected[i] = 0;
    if ((c.epilogue & kMaskIn) && !(mask_in[i / 32] >> i % 32 & 1)) expected[i] = 0;
  }
  return mask;
}

template <class T>
int compare(const char* text, const Array<T>& actual, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double wanted = value_of(Array<T>::rounded(expected[i])), found = value_of(actual.data()[i]);
    if (found == wanted) continue;
    std::printf("wrong value: %s element %zu is %g, not %g\n", text, i, found, wanted);
    return 1;
  }
  return 0;
}

template <class T>
int run_case(const char* text, const Case& c) {
  const Conv2dProblem& p = c.problem;
  const bool fprop = c.op == Operator::fprop, wgrad = c.op == Operator::wgrad;
  const std::vector<double> first = random_integers(fprop ? p.x_numel() : p.y_numel());
  const std::vector<double> second = random_integers(wgrad ? p.x_numel() : p.filter_numel());
  std::vector<double> expected = conv_reference(c.op, p, first, second);
  const std::vector<double> bias = random_integers(fprop ? p.k : p.c);
  const std::vector<double> residual = random_integers(static_cast<int64_t>(expected.size()));
  std::vector<uint32_t> mask_in((expected.size() + 31) / 32);
  for (uint32_t& word : mask_in) word = static_cast<uint32_t>(random_below(1 << 24) << 8 ^ random_below(1 << 24));
  const std::vector<uint32_t> expected_mask = finish(c, expected, bias, residual, mask_in);

  Target target;
  target.sm = 80, target.sm_count = 4, target.allow_tf32 = c.allow_tf32;
  Selection selection = select(c.op, p, c.dtype, target);
  if (c.family >= 0) {
    selection = Selection{};
    selection.family = static_cast<Family>(c.family), selection.config = c.config, selection.split_k = c.split_k;
    selection.workspace_bytes = workspace_bytes(c);
  }
  const Array<T> of_first(first), of_second(second), out(expected.size());
  const Array<T> of_bias(bias), of_residual(residual);
  const Array<uint32_t> mask_out(mask_in.size()), of_mask_in(mask_in.size());
  std::memcpy(of_mask_in.data(), mask_in.data(), of_mask_in.bytes());
  const Array<char> workspace(selection.workspace_bytes);
  Conv2dTensors tensors;
  (fprop ? tensors.x : tensors.y) = of_first.data();
  (wgrad ? tensors.x : tensors.filter) = of_second.data();
  (fprop ? tensors.y : wgrad ? tensors.filter : tensors.x) = out.data();
  Epilogue epilogue;
  if (c.epilogue & kBias) epilogue.bias = of_bias.data();
  if (c.epilogue & kResidual) epilogue.residual = of_residual.data();
  epilogue.relu = c.epilogue & kRelu;
  if (c.epilogue & kMaskOut) epilogue.mask_out = mask_out.data();
  if (c.epilogue & kMaskIn) epilogue.mask_in = of_mask_in.data();

  const Status status = freezekit_kernel_table()->conv2d(c.op, selection, p, c.dtype, tensors, epilogue,
                                                         workspace.data(), nullptr);
  if (status != Status::success) {
    std::printf("launch failed: %s: %s: %s\n", text, to_string(status), freezekit_last_error());
    return 3;
  }
  if (compare(text, out, expected)) return 1;
  if ((c.epilogue & kMaskOut) && std::memcmp(mask_out.data(), expected_mask.data(), mask_out.bytes()) != 0) {
    std::printf("wrong mask: %s\n", text);
    return 1;
  }
  return 0;
}

int run_case(const char* text, const Case& c) {
  switch (c.dtype) {
    case DType::f32:
      return run_case<float>(text, c);
    case DType::f64:
      return run_case<double>(text, c);
    case DType::f16:
      return run_case<f16>(text, c);
    case DType::bf16:
      return run_case<bf16>(text, c);
  }
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || !freezekit_emulator_set_cp_async(argv[2])) return 2;
  freezekit_emulator_set_seed(static_cast<unsigned>(std::atoi(argv[1])));
  for (int i = 3; i < argc; i++) {
    if (const int code = run_case(argv[i], parse(argv[i]))) return code;
  }
  const auto conflicts = static_cast<unsigned long long>(freezekit_emulator_counter("ldmatrix_conflicts"));
  if (conflicts) std::printf("bank conflicts in %llu phases of ldmatrix\n", conflicts);
  return conflicts ? 4 : 0;
}
