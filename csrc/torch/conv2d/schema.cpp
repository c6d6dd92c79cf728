// The one place where the operators' schemas stand, and the typed way into the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "torch/common/operators.h"

namespace freezekit {
namespace {

constexpr std::array<std::string_view, 4> kBackendNames = {"auto", "native", "aten", "emulated"};

std::array<int64_t, 2> pair(IntArrayRef values, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, name, " must be one number or two (height, width), got ",
              values.size(), " of them: ", values);
  return {values.front(), values.back()};
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

Backend parse_backend(std::string_view name) {
  for (size_t i = 0; i < kBackendNames.size(); ++i) {
    if (name == kBackendNames[i]) return static_cast<Backend>(i);
  }
  TORCH_CHECK_VALUE(false, "backend must be 'auto', 'native', 'aten' or 'emulated', got '", name, "'");
}

std::string_view to_string(Backend backend) { return kBackendNames[static_cast<size_t>(backend)]; }

Geometry::Geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                   std::string_view backend)
    : stride(pair(stride, "stride")),
      padding(pair(padding, "padding")),
      dilation(pair(dilation, "dilation")),
      groups(groups),
      backend(parse_backend(backend)) {}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry& g) {
  static const auto op = find<Conv2dSignature>("freezekit::conv2d");
  return op.call(input, weight, bias, g.stride, g.padding, g.dilation, g.groups, to_string(g.backend));
}

Tensor conv2d_dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size, const Geometry& g) {
  static const auto op = find<GradSignature>("freezekit::conv2d_dgrad");
  return op.call(grad_output, weight, input_size, g.stride, g.padding, g.dilation, g.groups, to_string(g.backend));
}

Tensor conv2d_wgrad(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size, const Geometry& g) {
  static const auto op = find<GradSignature>("freezekit::conv2d_wgrad");
  return op.call(grad_output, input, weight_size, g.stride, g.padding, g.dilation, g.groups, to_string(g.backend));
}

}  // namespace freezekit

TORCH_LIBRARY(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "int groups=1, *, str backend=\"auto\") -> Tensor",
      tags);
  m.def(
      "conv2d_dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, *, str backend=\"auto\") -> Tensor",
      tags);
  m.def(
      "conv2d_wgrad(Tensor grad_output, Tensor input, SymInt[] weight_size, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, *, str backend=\"auto\") -> Tensor",
      tags);
}
