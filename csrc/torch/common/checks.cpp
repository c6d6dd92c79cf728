#include "torch/common/checks.h"

#include <limits>

namespace freezekit {
namespace {

void check_range(const std::array<int64_t, 2>& values, const char* name, int64_t least) {
  for (const int64_t value : values) {
    TORCH_CHECK(value >= least && value < kExtentLimit, name, " must be ", least == 0 ? "non-negative" : "positive",
                " and below 2^31, got (", values[0], ", ", values[1], ")");
  }
}

// The value of a size, or nothing where it is symbolic and so no caller's claim.
std::optional<int64_t> known(int64_t size) { return size; }
std::optional<int64_t> known(const c10::SymInt& size) { return size.maybe_as_int(); }

template <class Int>
void check_known_extents(Sizes<Int> size, const char* name) {
  int64_t numel = 1;
  for (const Int& extent : size) {
    const std::optional<int64_t> value = known(extent);
    if (!value) continue;
    TORCH_CHECK(*value >= 0, name, " must have no negative size, got ", size);
    TORCH_CHECK(*value == 0 || numel <= std::numeric_limits<int64_t>::max() / 16 / *value, name, " of size ", size,
                " has more elements than can be addressed");
    numel *= *value == 0 ? 1 : *value;
  }
}

}  // namespace

void check_extents(IntArrayRef size, const char* name) { check_known_extents<int64_t>(size, name); }
void check_extents(SymIntArrayRef size, const char* name) { check_known_extents<c10::SymInt>(size, name); }

void check_geometry(const Geometry& g) {
  check_range(g.stride, "stride", 1);
  check_range(g.padding, "padding", 0);
  check_range(g.dilation, "dilation", 1);
  TORCH_CHECK(g.groups >= 1 && g.groups < kExtentLimit, "groups must be positive and below 2^31, got ", g.groups);
}

void check_formula_backend(Backend backend, const char* what) {
  TORCH_CHECK(!is_own(backend), "backend='", to_string(backend), "' does not take ", what,
              "; torch's own convolution does, with backend='aten'");
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
