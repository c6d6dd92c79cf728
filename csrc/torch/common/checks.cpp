#include "torch/common/checks.h"

#include <limits>

namespace freezekit {
namespace {

void check_range(const Geometry::Pair& values, const char* name, int64_t least) {
  for (const c10::SymInt& value : values) {
    const std::optional<int64_t> known = value.maybe_as_int();
    TORCH_CHECK(!known || (*known >= least && *known < kExtentLimit), name, " must be ",
                least == 0 ? "non-negative" : "positive", " and below 2^31, got (", values[0], ", ", values[1], ")");
  }
}

// No negative size, and not more elements than can be addressed.
void check_extents(SymIntArrayRef size, const char* name) {
  int64_t numel = 1;
  for (const c10::SymInt& extent : size) {
    const std::optional<int64_t> value = extent.maybe_as_int();
    if (!value) continue;
    TORCH_CHECK(*value >= 0, name, " must have no negative size, got ", size);
    TORCH_CHECK(*value == 0 || numel <= std::numeric_limits<int64_t>::max() / 16 / *value, name, " of size ", size,
                " has more elements than can be addressed");
    numel *= *value == 0 ? 1 : *value;
  }
}

void check_geometry(const Geometry& g) {
  check_range(g.stride, "stride", 1);
  check_range(g.padding, "padding", 0);
  check_range(g.dilation, "dilation", 1);
  const std::optional<int64_t> groups = g.groups.maybe_as_int();
  TORCH_CHECK(!groups || (*groups >= 1 && *groups < kExtentLimit), "groups must be positive and below 2^31, got ",
              g.groups);
}

// Checks sizes against each other and returns the output size.
SizeVector checked_output_size(SymIntArrayRef input, SymIntArrayRef weight, const Geometry& g) {
  check_rank(input, "input", "N, C, H, W");
  check_rank(weight, "weight", "out_channels, in_channels / groups, kernel height, kernel width");
  check_extents(input, "input");
  check_extents(weight, "weight");
  TORCH_CHECK(weight[0] >= 1 && weight[1] >= 1 && weight[2] >= 1 && weight[3] >= 1,
              "weight must have no empty dimension, got ", weight);
  TORCH_CHECK(weight[2] <= kExtentLimit && weight[3] <= kExtentLimit, "weight must have a kernel of at most 2^31 ",
              "elements a side, got ", weight);
  // This one first: with it, groups is at most weight[0], and the product of the next line cannot overflow.
  TORCH_CHECK(weight[0] % g.groups == 0, "weight has ", weight[0], " output channels, which groups=", g.groups,
              " does not divide");
  TORCH_CHECK(input[1] == weight[1] * g.groups, "input has ", input[1], " channels, weight of size ", weight,
              " with groups=", g.groups, " needs ", weight[1] * g.groups);
  SizeVector output = {input[0], weight[0], 0, 0};
  for (size_t i = 0; i < 2; ++i) {
    const c10::SymInt padded = input[2 + i] + g.padding[i] * 2;
    const c10::SymInt reach = g.dilation[i] * (weight[2 + i] - 1) + 1;
    TORCH_CHECK(input[2 + i] >= 1 && padded >= reach, "the dilated kernel must fit into the padded input along ",
                i == 0 ? "height" : "width", ": it spans ", reach, ", the padded input ", padded, " (input ",
                input[2 + i], ", padding ", g.padding[i], ", kernel ", weight[2 + i], ", dilation ", g.dilation[i],
                ")");
    output[2 + i] = (padded - reach) / g.stride[i] + 1;
  }
  return output;
}

// grad_output against what conv2d of these sizes gives.
void check_grad_output(SymIntArrayRef grad_output, SymIntArrayRef input, SymIntArrayRef weight, const Geometry& g) {
  check_rank(grad_output, "grad_output", "N, out_channels, P, Q");
  const SizeVector expected = checked_output_size(input, weight, g);
  for (size_t i = 0; i < 4; ++i) {
    TORCH_CHECK(grad_output[i] == expected[i], "grad_output must have size ", SymIntArrayRef(expected),
                " for input_size ", input, " and weight_size ", weight, ", got ", grad_output);
  }
}

}  // namespace

void check_rank(SymIntArrayRef size, const char* name, const char* axes) {
  TORCH_CHECK(size.size() == 4, name, " must have 4 dimensions (", axes, "), got ", size.size(), ": ", size);
}

void check_bias(SymIntArrayRef bias, SymIntArrayRef weight) {
  TORCH_CHECK(bias.size() == 1 && bias[0] == weight[0], "bias must have size [", weight[0],
              "], one value per output channel, got ", bias);
}

void check_floating(const Tensor& tensor, const char* name) {
  TORCH_CHECK(at::isFloatingType(tensor.scalar_type()), name, " must be of a floating dtype, got ",
              tensor.scalar_type());
}

SizeVector check_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Geometry& g) {
  check_geometry(g);
  check_same(input, "input", weight, "weight");
  SizeVector output = checked_output_size(input.sym_sizes(), weight.sym_sizes(), g);
  if (bias && bias->defined()) {
    check_same(input, "input", *bias, "bias");
    check_bias(bias->sym_sizes(), weight.sym_sizes());
  }
  return output;
}

bool is_sound_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, const Geometry& g) {
  constexpr int64_t kMostElements = std::numeric_limits<int64_t>::max() / 16;
  const IntArrayRef x = input.sizes(), w = weight.sizes();
  const auto groups = g.groups.maybe_as_int();
  if (x.size() != 4 || w.size() != 4 || !groups || *groups < 1 || *groups >= kExtentLimit || w[0] < 1 || w[1] < 1 ||
      w[0] % *groups != 0 || x[1] != w[1] * *groups || input.numel() < 1 || input.numel() > kMostElements ||
      weight.numel() > kMostElements || input.scalar_type() != weight.scalar_type()) {
    return false;
  }
  if (bias.defined() && (bias.dim() != 1 || bias.sizes()[0] != w[0] || bias.scalar_type() != input.scalar_type())) {
    return false;
  }
  for (size_t i = 0; i < 2; ++i) {
    const auto stride = g.stride[i].maybe_as_int(), padding = g.padding[i].maybe_as_int();
    const auto dilation = g.dilation[i].maybe_as_int();
    const auto is_within = [](const std::optional<int64_t>& number, int64_t least) {
      return number && *number >= least && *number < kExtentLimit;
    };
    if (!is_within(stride, 1) || !is_within(padding, 0) || !is_within(dilation, 1)) return false;
    const int64_t extent = x[2 + i], taps = w[2 + i];
    if (extent < 1 || taps < 1 || taps > kExtentLimit || extent + 2 * *padding <= *dilation * (taps - 1)) return false;
  }
  return true;
}

void check_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  check_geometry(g);
  check_same(grad_output, "grad_output", weight, "weight");
  check_grad_output(grad_output.sym_sizes(), input_size, weight.sym_sizes(), g);
}

void check_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  check_geometry(g);
  check_same(grad_output, "grad_output", input, "input");
  check_grad_output(grad_output.sym_sizes(), input.sym_sizes(), weight_size, g);
}

void check_operand(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.defined(), name, " must be a tensor, got an undefined one");
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_nested(), name, " must be a dense tensor, got a nested one");
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_quantized(), name, " must not be quantized, got dtype ", tensor.scalar_type(),
                              "; torch.ao quantizes nn.Conv2d alone: make the layer one again first");
  TORCH_CHECK(tensor.layout() == at::kStrided || tensor.layout() == at::kMkldnn, name,
              " must be a dense tensor, got layout ", tensor.layout());
}

void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check_operand(a, a_name);
  check_operand(b, b_name);
  TORCH_CHECK(a.device() == b.device(), a_name, " is on ", a.device(), ", ", b_name, " is on ", b.device(),
              ": both must be on one device");
  // A oneDNN tensor goes with a dense one, as in torch; not the other way round.
  TORCH_CHECK(a.layout() == b.layout() || a.is_mkldnn(), a_name, " has layout ", a.layout(), ", ", b_name,
              " has layout ", b.layout(), ": both must have one layout");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), a_name, " has dtype ", a.scalar_type(), ", ", b_name, " has dtype ",
              b.scalar_type(), ": both must have one dtype");
}

}  // namespace freezekit
