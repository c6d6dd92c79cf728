#include "torch/lossy/lossy.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/smooth.h"
#include "torch/autograd/formula.h"
#include "torch/backends/cpu_formats.h"
#include "torch/bits/gate.h"
#include "torch/common/layout.h"
#include "torch/common/unseen.h"

namespace freezekit::lossy {
namespace {

using cpu::CodeGrid;

constexpr int64_t kBlocksPerTask = 512;  // 32768 elements, as torch cuts elementwise work
constexpr int64_t kFewElements = 1024;   // a node of its own weighs as much as codes save
constexpr double kMostExponent = 80;     // of a softplus: where e^(beta x) overflows, torch's gradient is NaN
// Of ELU: how much steeper it may be left of 0 than right of it. The step grows with that.
constexpr double kMostAbove = 1;

std::atomic<int> bits_ = 0;
thread_local bool is_shown_ = false;

// Where an ELU is monotonic and its derivative lies between 0 and a few times `scale`.
bool has_range(const Activation& f) {
  if (f.kind == Kind::softplus) return f.a > 0 && std::isfinite(f.a) && f.b <= kMostExponent;
  if (f.kind != Kind::elu) return true;
  const double left = f.a * f.c;
  return f.b > 0 && std::isfinite(f.b) && f.a >= 0 && f.c > 0 && left <= 1 + kMostAbove;
}

// g(the activation's rule).
template <class G>
auto by_rule(const Activation& f, const G& g) {
  switch (f.kind) {
    case Kind::silu:
      return g(cpu::Silu{});
    case Kind::gelu:
      return g(cpu::Gelu{});
    case Kind::gelu_tanh:
      return g(cpu::GeluTanh{});
    case Kind::mish:
      return g(cpu::Mish{});
    case Kind::hardswish:
      return g(cpu::Hardswish{});
    case Kind::softplus:
      return g(cpu::Softplus{static_cast<float>(f.a), static_cast<float>(f.b)});
    default:
      return g(cpu::Elu{static_cast<float>(f.b), static_cast<float>(f.a * f.b * f.c), static_cast<float>(f.c)});
  }
}

CodeGrid grid_of(const Activation& f, int bits) {
  return by_rule(f, [&]<class Rule>(const Rule&) {
    if constexpr (std::is_same_v<Rule, cpu::Elu>) {
      return CodeGrid::of(bits, f.b, 0, std::max(0.0, f.a * f.c - 1));
    } else {
      return CodeGrid::of(bits, 1, Rule::kBelow, Rule::kAbove);
    }
  });
}

bool has_codes(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }

// f(T()) of a type that has codes.
template <class F>
void by_type(at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(float());
  type == at::kBFloat16 ? f(c10::BFloat16()) : f(c10::Half());
}

template <class F>
void in_tasks(int64_t numel, const F& task) {
  at::parallel_for(0, (numel + cpu::kCodeBlock - 1) / cpu::kCodeBlock, kBlocksPerTask, task);
}

template <class T, class Rule>
void encode_cpu(const Tensor& x, const Tensor& codes, int bits, Rule rule, const CodeGrid& grid) {
  const T* const from = x.const_data_ptr<T>();
  uint8_t* const to = codes.mutable_data_ptr<uint8_t>();
  const int64_t numel = x.numel();
  in_tasks(numel, [&](int64_t first, int64_t last) {
    if (bits == 8) {
      cpu::in_vectors<cpu::encode_blocks<8, T, Rule>>(from, to, numel, first, last, rule, grid);
    } else {
      cpu::in_vectors<cpu::encode_blocks<4, T, Rule>>(from, to, numel, first, last, rule, grid);
    }
  });
}

// In the memory order of x, which is dense.
Tensor encode(const Tensor& x, const Activation& f, int bits, const CodeGrid& grid) {
  const c10::SymInt count = bits == 8 ? x.sym_numel() : (x.sym_numel() + 1) / 2;
  const Tensor codes = empty_beside(x, count, at::MemoryFormat::Contiguous, at::kByte);
  if (x.is_meta() || x.key_set().has(c10::DispatchKey::Python)) return codes;  // no data to look at
  by_rule(f,
          [&](auto rule) { by_type(x.scalar_type(), [&]<class T>(T) { encode_cpu<T>(x, codes, bits, rule, grid); }); });
  return codes;
}

// As a float tensor of the gradient's size.
Tensor decode_by_aten(const Tensor& codes, int64_t bits, const CodeGrid& grid, SymIntArrayRef size,
                      SymIntArrayRef stride) {
  Tensor single = codes;
  if (bits == 4) {
    const c10::SymInt numel = c10::multiply_integers(size), blocks = numel / cpu::kCodeBlock;
    const auto apart = [](const Tensor& packed) {
      return at::cat({packed.bitwise_and(15), packed.bitwise_right_shift(4)}, -1);
    };
    const Tensor whole = codes.narrow_symint(0, 0, blocks * 32).view_symint({blocks, c10::SymInt(32)});
    const Tensor rest = codes.narrow_symint(0, blocks * 32, codes.sym_size(0) - blocks * 32);
    single = at::cat({apart(whole).flatten(), apart(rest)}).narrow_symint(0, 0, numel);
  }
  const Tensor value = single.to(at::kFloat).sub(grid.zero).div(grid.steps).mul(grid.unit);
  return at::where(single.eq(grid.last), std::numeric_limits<double>::quiet_NaN(), value)
      .as_strided_symint(size, stride);
}

bool has_kernel(const Tensor& grad, const Tensor& codes) {
  return grad.device().is_cpu() && reaches_kernel(grad, codes) && has_codes(grad.scalar_type());
}

Tensor decode_cpu(const Tensor& grad, const Tensor& codes, int64_t bits, const CodeGrid& grid, IntArrayRef stride) {
  const auto empty = [&] {
    return at::Tensor(at::detail::empty_strided_cpu(grad.sizes(), stride, grad.scalar_type()));
  };
  const Tensor dx = empty(), dy = is_in_place(grad, stride) ? grad : empty().copy_(grad);
  const uint8_t* const from = codes.const_data_ptr<uint8_t>();
  const int64_t numel = dy.numel();
  const auto run = [&]<class T>(const T* in, T* out) {
    in_tasks(numel, [&](int64_t first, int64_t last) {
      if (bits == 8) {
        cpu::in_vectors<cpu::decode_blocks<8, T>>(in, from, out, numel, first, last, grid);
      } else {
        cpu::in_vectors<cpu::decode_blocks<4, T>>(in, from, out, numel, first, last, grid);
      }
    });
  };
  by_type(grad.scalar_type(), [&]<class T>(T) { run(dy.const_data_ptr<T>(), dx.mutable_data_ptr<T>()); });
  return dx;
}

struct Gradient {
  SizeVector stride;  // of what was encoded
  int64_t bits = 8;
  double unit = 1, steps = 1, zero = 0;

  auto fields() { return std::tie(stride, bits, unit, steps, zero); }
  Link link() const { return {}; }

  CodeGrid grid() const {
    return {static_cast<float>(unit), static_cast<float>(steps), static_cast<float>(zero), (1 << bits) - 1};
  }

  variable_list gradients(const Tensor& grad, Kept kept, const Wanted& wanted) const {
    if (!wanted[0]) return {Tensor()};
    const Tensor codes = kept(0);
    if (has_kernel(grad, codes)) {
      Operand operand;
      operand.is_first = false;  // as of all these operators of torch's
      return {operand.finish(decode_cpu(grad, codes, bits, grid(), C10_AS_INTARRAYREF_SLOW(stride)), grad, stride)};
    }
    const Tensor factor = decode_by_aten(codes, bits, grid(), grad.sym_sizes(), stride);
    return {at::mul(grad, factor).to(grad.scalar_type())};
  }
};

class Node : public FormulaNode<Gradient> {
 public:
  using FormulaNode::FormulaNode;

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !c10::GradMode::is_enabled() || !grads[0].defined(),
        "this backward pass is to be differentiated (create_graph=True), and an activation keeps "
        "its derivative in ",
        formula_.bits,
        " bits, of which there is none: run its forward pass with precision=None, as in `with "
        "freezekit.enabled():`");
    return FormulaNode::apply(std::move(grads));
  }
};

NodePtr<Node> node_of(const Tensor& x, int bits, const CodeGrid& grid) {
  Gradient gradient{{x.sym_strides().begin(), x.sym_strides().end()}, bits, grid.unit, grid.steps, grid.zero};
  return make_node<Node>("FreezekitLossyActivationBackward", std::move(gradient));
}

// Of x before it is written to.
void keep_codes(Node& node, const Tensor& x, const Activation& f, int bits, const CodeGrid& grid) {
  const Tensor codes = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return encode(x, f, bits, grid);
  }();
  is_shown_ = true;
  const auto shown = c10::make_scope_exit([] { is_shown_ = false; });
  node.keep(codes);
}

}  // namespace

void set_bits(int bits) { bits_ = bits; }

int bits() { return bits_; }

bool is_shown() { return is_shown_; }

bool gains(const Tensor& x, const Activation& f, int bits) {
  if (!has_codes(x.scalar_type())) return false;
  // A leaf is its owner's. Of a part of a storage the rest may be kept, and all of it then is.
  if (x.is_leaf() || x.sym_numel() < kFewElements || !x.is_non_overlapping_and_dense()) return false;
  if (x.sym_numel() * static_cast<int64_t>(x.element_size()) != x.storage().sym_nbytes() || !has_range(f)) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(x.device().is_cpu() || x.is_meta(), "precision=\"int", bits,
                              "\" keeps derivatives of activations on a CPU alone, got one on ", x.device(),
                              ": run its forward pass with precision=None, as in `with freezekit.enabled():`");
  return true;
}

Tensor record(const Tensor& x, const Activation& f, int bits, c10::function_ref<Tensor()> compute) {
  const CodeGrid grid = grid_of(f, bits);
  Tensor y = compute();
  const auto node = node_of(x, bits, grid);
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  keep_codes(*node, x, f, bits, grid);
  torch::autograd::set_history(y, node);
  return y;
}

void record_(Tensor& x, const Activation& f, int bits, c10::function_ref<void()> compute) {
  const CodeGrid grid = grid_of(f, bits);
  torch::autograd::check_inplace(x, /*requires_grad=*/true);
  const auto node = node_of(x, bits, grid);
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  keep_codes(*node, x, f, bits, grid);
  compute();
  torch::autograd::impl::rebase_history(x, {node, node->add_input_metadata(x)});
}

}  // namespace freezekit::lossy
