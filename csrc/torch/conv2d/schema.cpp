// The schemas of the three operators, and their settings.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "torch/common/operators.h"

namespace freezekit {
namespace {

constexpr std::array<std::string_view, 4> kBackendNames = {"auto", "native", "aten", "emulated"};

Geometry::Pair pair(SymIntArrayRef values, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, name, " must be one number or two (height, width), got ",
              values.size(), " of them: ", values);
  return {values.front(), values.back()};
}

}  // namespace

Backend parse_backend(std::string_view name) {
  for (size_t i = 0; i < kBackendNames.size(); ++i) {
    if (name == kBackendNames[i]) return static_cast<Backend>(i);
  }
  TORCH_CHECK_VALUE(false, "backend must be 'auto', 'native' or 'aten', got '", name, "'");
}

std::string_view to_string(Backend backend) { return kBackendNames[static_cast<size_t>(backend)]; }

Geometry::Geometry(SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, c10::SymInt groups,
                   std::string_view backend)
    : stride(pair(stride, "stride")), padding(pair(padding, "padding")), dilation(pair(dilation, "dilation")),
      groups(std::move(groups)), backend(parse_backend(backend)) {}

}  // namespace freezekit

TORCH_LIBRARY(freezekit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string settings =
      "SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, str backend=\"auto\") -> Tensor";
  m.def(("conv2d(Tensor input, Tensor weight, Tensor? bias=None, " + settings).c_str(), tags);
  m.def(("conv2d_dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, " + settings).c_str(), tags);
  m.def(("conv2d_wgrad(Tensor grad_output, Tensor input, SymInt[] weight_size, " + settings).c_str(), tags);
}
