// Runs convolutions through the kernels' table and compares every bit with conv_reference.
//
//   conv_driver SEED CP_ASYNC DATA CASE...        emulated
//   conv_driver SEED MEMORY DATA CASE...          on a GPU; MEMORY: poisoned, or unwritten for initcheck
//     DATA: integers, whose sums are exact and compared; or reals, of which a checksum of the output's bits is printed;
//           or rehearsals, the problems that a proof holds before it trusts the case's class, on integers
//     CASE: operator,dtype,family,config,split_k,epilogue,allow_tf32,and 16 sizes; family -1 takes what select() chooses,
//           its config and split_k with it
#include "kernels/rehearsals.h"
#include "kernels/select.h"
#include "tests/emulator/conv_reference.h"
#include "tests/emulator/driver.h"

using namespace freezekit;
using namespace driver;

namespace {

enum EpilogueBits {
  kBias = 1,
  kResidual = 2,
  kRelu = 4,
  kMaskOut = 8,
  kMaskIn = 16,
  kRelu6 = 32,
  kWideBias = 64,
  kScale = 128,
  kFilterScale = 256
};

struct Case {
  const char* text;
  Operator op;
  DType dtype;
  int family, config, split_k, epilogue, allow_tf32;
  Conv2dProblem problem;
};

Case parse(const char* text) {
  std::vector<int64_t> v;
  for (char* at = const_cast<char*>(text); *at; at += *at == ',') v.push_back(std::strtoll(at, &at, 10));
  if (v.size() != 23) std::fprintf(stderr, "a case has 23 numbers, got %zu\n", v.size()), std::exit(kUsage);
  const auto number = [&](int i) { return static_cast<int>(v[static_cast<size_t>(i)]); };
  Case c{text,
         static_cast<Operator>(v[0]),
         static_cast<DType>(v[1]),
         number(2),
         number(3),
         number(4),
         number(5),
         number(6),
         {}};
  Conv2dProblem& p = c.problem;
  p.n = v[7], p.c = v[8], p.h = v[9], p.w = v[10], p.k = v[11], p.r = v[12], p.s = v[13], p.p = v[14], p.q = v[15];
  p.pad_h = v[16], p.pad_w = v[17], p.stride_h = v[18], p.stride_w = v[19], p.dilation_h = v[20], p.dilation_w = v[21];
  p.groups = v[22];
  return c;
}

Target target_of(const Case& c) {
  Target target;
  target.sm = 80, target.sm_count = 4, target.allow_tf32 = c.allow_tf32;
  return target;
}

Selection selection_of(const Case& c) {
  const Target target = target_of(c);
  Selection selection = select(c.op, c.problem, c.dtype, target);
  if (c.family < 0) return selection;
  selection = Selection{};
  selection.family = static_cast<Family>(c.family), selection.config = c.config, selection.split_k = c.split_k;
  selection.workspace_bytes = workspace_bytes(c.op, selection, c.problem, c.dtype);
  return selection;
}

// Applies the epilogue to `expected` and returns the mask that the kernel must write.
std::vector<uint32_t> finish(const Case& c, std::vector<double>& expected, const std::vector<double>& scale,
                             const std::vector<double>& bias, const std::vector<double>& residual,
                             const std::vector<uint32_t>& mask_in) {
  std::vector<uint32_t> mask(mask_in.size(), 0);
  for (size_t i = 0; i < expected.size(); i++) {
    if (c.epilogue & kScale) expected[i] *= scale[i % scale.size()];
    if (c.epilogue & kBias) expected[i] += bias[i % bias.size()];
    if (c.epilogue & kResidual) expected[i] += residual[i];
    const bool beyond = (c.epilogue & kRelu6) && expected[i] >= 6;
    if (expected[i] > 0 && !beyond) mask[i / 32] |= 1u << i % 32;
    if (beyond) expected[i] = 6;
    if ((c.epilogue & kRelu) && !(expected[i] > 0)) expected[i] = 0;
    if ((c.epilogue & kMaskIn) && !(mask_in[i / 32] >> i % 32 & 1)) expected[i] = 0;
  }
  return mask;
}

template <class T>
int print_checksum(const char* text, const Array<T>& out) {
  uint64_t sum = 14695981039346656037u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(out.fetched());
  for (size_t i = 0; i < out.bytes(); i++) sum = (sum ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", text, static_cast<unsigned long long>(sum));
  return kRight;
}

template <class T>
int run_case(const Case& c, const Selection& selection, bool integers) {
  const Conv2dProblem& p = c.problem;
  const bool fprop = c.op == Operator::fprop, wgrad = c.op == Operator::wgrad;
  const auto random = integers ? random_integers : random_reals;
  const std::vector<double> first = random(fprop ? p.x_numel() : p.y_numel());
  const std::vector<double> second = random(wgrad ? p.x_numel() : p.filter_numel());
  const std::vector<double> filter_scale = random(p.k);
  std::vector<double> scaled = second;
  if (c.epilogue & kFilterScale) {
    for (size_t i = 0; i < scaled.size(); i++) scaled[i] *= filter_scale[i / (scaled.size() / filter_scale.size())];
  }
  std::vector<double> expected = conv_reference(c.op, p, first, scaled);
  const std::vector<double> bias = random(fprop ? p.k : p.c), scale = random(fprop ? p.k : p.c);
  const std::vector<double> residual = random(static_cast<int64_t>(expected.size()));
  std::vector<uint32_t> mask_in((expected.size() + 31) / 32);
  for (uint32_t& word : mask_in) word = static_cast<uint32_t>(random_below(1 << 24) << 8 ^ random_below(1 << 24));
  const std::vector<uint32_t> expected_mask = finish(c, expected, scale, bias, residual, mask_in);

  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Array<T> of_first(first), of_second(second), out(expected.size()), of_bias(bias), of_residual(residual);
  const Array<Wide> of_wide_bias(bias), of_scale(scale), of_filter_scale(filter_scale);
  const Array<uint32_t> mask_out(mask_in.size()), of_mask_in(mask_in);
  const Array<char> workspace(selection.workspace_bytes);
  Conv2dTensors tensors;
  (fprop ? tensors.x : tensors.y) = of_first.data();
  (wgrad ? tensors.x : tensors.filter) = of_second.data();
  (fprop ? tensors.y : wgrad ? tensors.filter : tensors.x) = out.data();
  if (c.epilogue & kFilterScale) tensors.filter_scale = of_filter_scale.data();
  Epilogue epilogue;
  epilogue.wide_bias = c.epilogue & kWideBias;
  if (c.epilogue & kBias) epilogue.bias = epilogue.wide_bias ? static_cast<void*>(of_wide_bias.data()) : of_bias.data();
  if (c.epilogue & kScale) epilogue.scale = of_scale.data();
  if (c.epilogue & kResidual) epilogue.residual = of_residual.data();
  epilogue.relu = c.epilogue & kRelu;
  if (c.epilogue & kRelu6) epilogue.relu_end = 6;
  if (c.epilogue & kMaskOut) epilogue.mask_out = mask_out.data();
  if (c.epilogue & kMaskIn) epilogue.mask_in = of_mask_in.data();

  const Status status =
      freezekit_kernel_table()->conv2d(c.op, selection, p, c.dtype, tensors, epilogue, workspace.data(), nullptr);
  if (const int failed = check_status(c.text, status)) return failed;
  if (!integers) return print_checksum(c.text, out);
  if (const int wrong = compare(c.text, out, expected)) return wrong;
  return c.epilogue & kMaskOut ? compare_mask(c.text, mask_out, expected_mask) : kRight;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5 || !set_schedule(static_cast<unsigned>(std::atoi(argv[1])), argv[2])) return kUsage;
  const bool rehearses = std::strcmp(argv[3], "rehearsals") == 0;
  const bool integers = rehearses || std::strcmp(argv[3], "integers") == 0;
  for (int i = 4; i < argc; i++) {
    const Case c = parse(argv[i]);
    const auto run = [&](const Case& of, const Selection& by) {
      return with_type(of.dtype, [&](auto zero) { return run_case<decltype(zero)>(of, by, integers); });
    };
    if (!rehearses) {
      if (const int code = run(c, selection_of(c))) return code;
      continue;
    }
    for (const Rehearsed& part : rehearsals(c.op, c.problem, c.dtype, selection_of(c), target_of(c))) {
      Case of = c;
      of.problem = part.problem;
      if (const int code = run(of, part.selection)) return code;
    }
  }
  const unsigned long long conflicts = bank_conflicts();
  if (conflicts) std::printf("bank conflicts in %llu phases of ldmatrix\n", conflicts);
  return conflicts ? kBankConflicts : kRight;
}
