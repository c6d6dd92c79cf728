#include "torch/backends/own_values.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <limits>

namespace freezekit::proof {
namespace {

bool is_prime(size_t number) {
  for (size_t i = 2; i * i <= number; ++i) {
    if (number % i == 0) return false;
  }
  return number > 1;
}

// A row of `values` and as many powers of 1.5 as make its length a prime.
Tensor table_of(std::vector<double> values, const at::TensorOptions& options) {
  for (double more = 1.5; !is_prime(values.size()); more *= -1.5) values.push_back(more);
  const Tensor row = at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble);
  return at::empty(row.sizes(), options).copy_(row);
}

struct Limits {
  double largest, smallest, subnormal, epsilon;
};

Limits limits_of(at::ScalarType type) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "freezekit::proof", [] {
    using Of = std::numeric_limits<scalar_t>;
    return Limits{static_cast<double>(Of::max()), static_cast<double>(Of::min()), static_cast<double>(Of::denorm_min()),
                  static_cast<double>(Of::epsilon())};
  });
}

// Numbers from 0 to `below` - 1 without a pattern; `which` of the tables, whose lengths differ.
std::vector<double> mixed_numbers(int which, int below) {
  constexpr std::array<size_t, 3> lengths = {509, 521, 541};
  std::vector<double> values(lengths[which]);
  uint64_t state = which + 1;
  for (double& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's multiplier
    value = static_cast<double>((state >> 33) % below);
  }
  return values;
}

Tensor integers(int which, IntArrayRef size, at::ScalarType type, const Tensor& like) {
  std::vector<double> values = mixed_numbers(which, 5);
  for (double& value : values) value -= 2;
  return repeated(table_of(std::move(values), like.options().dtype(type)), size, like.suggest_memory_format());
}

}  // namespace

Tensor special_values(const Tensor& like, std::initializer_list<double> around) {
  const Limits of = limits_of(like.scalar_type());
  constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> values = {0., -0., nan};
  const auto add = [&](std::initializer_list<double> sizes) {
    for (const double size : sizes) values.insert(values.end(), {size, -size});
  };
  add({infinity, of.largest, of.smallest, of.subnormal});
  values.push_back(3 * of.subnormal);
  add({1., 1 + of.epsilon, 1. / 3});
  for (const double rounded : {2.7182818284590452, -3.1415926535897932, 0.1, -0.7, 100.3, -250.9, 1e-3, -2e-3}) {
    values.push_back(rounded);
  }
  for (const double end : around) {
    values.insert(values.end(), {end, end * (1 + of.epsilon), end * (1 - of.epsilon)});
  }
  return table_of(std::move(values), like.options());
}

Tensor values_with_ties(const Tensor& like) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return table_of({3, 3, -1, 0, -0., 0, 3, -2, 5, 5, -infinity, 5, -7, -7, -7, 1. / 3, 2, 0.1, -5}, like.options());
}

Tensor repeated(const Tensor& table, IntArrayRef size, at::MemoryFormat format) {
  const Tensor result = at::empty(size, table.options(), format);
  const int64_t period = table.numel(), whole = result.numel() / period, rest = result.numel() % period;
  const Tensor row = result.as_strided({result.numel()}, {1});
  row.narrow(0, 0, whole * period).view({whole, period}).copy_(table);
  row.narrow(0, whole * period, rest).copy_(table.narrow(0, 0, rest));
  return result;
}

Tensor mixed_bits(int64_t words, const Tensor& like) {
  constexpr int64_t golden = -7046029254386353131;  // 2^64 over the golden ratio: its multiples' high bits mix
  const Tensor mixed = at::arange(1, words + 1, like.options().dtype(at::kLong)).mul_(golden);
  return mixed.bitwise_right_shift(32).to(at::kInt);
}

Geometry Rehearsal::geometry(const Geometry& like) const {
  Geometry own = like;
  own.groups = problem.groups;
  return own;
}

Tensor Rehearsal::x(const Tensor& like) const {
  return integers(0, {problem.n, problem.c, problem.h, problem.w}, dtype, like);
}

Tensor Rehearsal::weight(const Tensor& like) const {
  return integers(1, {problem.k, problem.c_per_group(), problem.r, problem.s}, dtype, like);
}

Tensor Rehearsal::y(const Tensor& like) const {
  return integers(2, {problem.n, problem.k, problem.p, problem.q}, dtype, like);
}

std::vector<c10::SymInt> Rehearsal::x_size() const { return {problem.n, problem.c, problem.h, problem.w}; }

Tensor Rehearsal::per_channel(at::ScalarType type, const Tensor& like, std::vector<double> table) const {
  return repeated(table_of(std::move(table), like.options().dtype(type)), {problem.k});
}

}  // namespace freezekit::proof
