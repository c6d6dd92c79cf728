#include "torch/checks.h"

#include <limits>

namespace freezekit {
namespace {

// Products of sizes and geometry must stay far from int64's end: a size that lies must not wrap around.
constexpr int64_t kLimit = int64_t{1} << 31;

void check_range(const std::array<int64_t, 2>& values, const char* name, int64_t least) {
  for (const int64_t value : values) {
    TORCH_CHECK(value >= least && value < kLimit, name, " must be ", least == 0 ? "non-negative" : "positive",
                " and below 2^31, got (", values[0], ", ", values[1], ")");
  }
}

void check_sizes_in_range(IntArrayRef size, const char* name) {
  int64_t numel = 1;
  for (const int64_t extent : size) {
    TORCH_CHECK(extent >= 0, name, " must have no negative size, got ", size);
    TORCH_CHECK(extent == 0 || numel <= std::numeric_limits<int64_t>::max() / 16 / extent, name, " of size ", size,
                " has more elements than can be addressed");
    numel *= extent == 0 ? 1 : extent;
  }
}

Conv2dProblem problem_of(IntArrayRef x, IntArrayRef w, IntArrayRef y, const Geometry& g) {
  Conv2dProblem problem;
  problem.n = x[0], problem.c = x[1], problem.h = x[2], problem.w = x[3];
  problem.k = w[0], problem.r = w[2], problem.s = w[3];
  problem.p = y[2], problem.q = y[3];
  problem.pad_h = g.padding[0], problem.pad_w = g.padding[1];
  problem.stride_h = g.stride[0], problem.stride_w = g.stride[1];
  problem.dilation_h = g.dilation[0], problem.dilation_w = g.dilation[1];
  problem.groups = g.groups;
  return problem;
}

Conv2dProblem check_grad(const Tensor& grad_output, IntArrayRef input, IntArrayRef weight, const Geometry& g) {
  check_geometry(g);
  check_sizes_in_range(input, "input_size");
  check_sizes_in_range(weight, "weight_size");
  check_grad_output<int64_t>(grad_output.sizes(), input, weight, g);
  return problem_of(input, weight, grad_output.sizes(), g);
}

}  // namespace

void check_geometry(const Geometry& g) {
  check_range(g.stride, "stride", 1);
  check_range(g.padding, "padding", 0);
  check_range(g.dilation, "dilation", 1);
  TORCH_CHECK(g.groups >= 1 && g.groups < kLimit, "groups must be positive and below 2^31, got ", g.groups);
}

void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  TORCH_CHECK(a.defined(), a_name, " must be a tensor, got an undefined one");
  TORCH_CHECK(b.defined(), b_name, " must be a tensor, got an undefined one");
  TORCH_CHECK(a.device() == b.device(), a_name, " is on ", a.device(), ", ", b_name, " is on ", b.device(),
              ": both must be on one device");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), a_name, " has dtype ", a.scalar_type(), ", ", b_name, " has dtype ",
              b.scalar_type(), ": both must have one dtype");
}

Conv2dProblem check_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Geometry& g) {
  check_geometry(g);
  check_same(input, "input", weight, "weight");
  const auto output = checked_output_size<int64_t>(input.sizes(), weight.sizes(), g);
  if (bias && bias->defined()) {
    check_same(input, "input", *bias, "bias");
    check_bias<int64_t>(bias->sizes(), weight.sizes());
  }
  return problem_of(input.sizes(), weight.sizes(), output, g);
}

Conv2dProblem check_dgrad(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size, const Geometry& g) {
  check_same(grad_output, "grad_output", weight, "weight");
  return check_grad(grad_output, input_size, weight.sizes(), g);
}

Conv2dProblem check_wgrad(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size, const Geometry& g) {
  check_same(grad_output, "grad_output", input, "input");
  return check_grad(grad_output, input.sizes(), weight_size, g);
}

}  // namespace freezekit
