#include "torch/backends/conv2d_proofs.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/backends/choices.h"
#include "torch/backends/native.h"

namespace freezekit::proof {
namespace {

int64_t terms_of(Operator op, const Conv2dProblem& p) {
  if (op == Operator::wgrad) return p.n * p.p * p.q;
  return (op == Operator::fprop ? p.c_per_group() : p.k_per_group()) * p.r * p.s;
}

// Of what sums are accumulated in.
double epsilon_of(const Conv2dStep& step) {
  return step.on.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                              : std::numeric_limits<float>::epsilon();
}

// How far two ways of summing may be apart, in units of the largest sum: the error grows with the root of their length.
// Winograd's transforms, which torch may choose, lose a digit.
double rounding_of_sums(const Conv2dStep& step) {
  return 16 * epsilon_of(step) * (8 + std::sqrt(static_cast<double>(terms_of(step.op, step.problem))));
}

// Of what is multiplied and stored.
double rounding_of_values(const Conv2dStep& step, const Target& target) {
  constexpr double tf32 = 0x1p-10, half = 0x1p-10, bfloat16 = 0x1p-7;
  const auto type = step.on.scalar_type();
  const bool rounds_to_tf32 = type == at::kFloat && target.allow_tf32;
  return type == at::kHalf ? half : type == at::kBFloat16 ? bfloat16 : rounds_to_tf32 ? tf32 : 0;
}

// In which neither way rounds more than it has to.
at::ScalarType exact_type(const Tensor& of) { return of.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// On a caller's tensors: by one or the other.
Bound bound_on_call(const Conv2dStep& step, const Target& target) {
  const double bound = std::max(rounding_of_sums(step), rounding_of_values(step, target));
  return {2 * bound, bound};
}

// Where sums cancel, what is left is rounding, which goes with the size of the terms and not with that of the sum. In any
// order, a computed sum of n terms is off by at most n u / (1 - n u) times the sum of |terms| (Higham, Accuracy and
// Stability of Numerical Algorithms, second edition, equations 3.5 and 4.4). u is half an epsilon where numbers are
// rounded and a whole one where they are cut off, as tensor cores may do: two ways are apart by at most 2 n epsilon of that
// sum, with the digit for transforms once more. What is rounded before it is added, factors to tf32 and what torch stores
// between two operators, is off by the same share of a term, in each of two ways.
Bound bound_on_cancelling(const Conv2dStep& step, const Target& target) {
  const double terms = static_cast<double>(terms_of(step.op, step.problem)) + 16 * 8;
  return {bound_on_call(step, target).of_value, 2 * terms * epsilon_of(step) + 2 * rounding_of_values(step, target)};
}

// On integers only what is stored is rounded.
Bound bound_on_integers(const Conv2dStep& step) {
  constexpr double half = 0x1p-11, bfloat16 = 0x1p-8;
  const auto type = step.on.scalar_type();
  return {type == at::kHalf ? half : type == at::kBFloat16 ? bfloat16 : 0, rounding_of_sums(step)};
}

// Elements of both activations: unless the kernel, or a sum in many slices, takes more.
constexpr int64_t kRehearsed = 1 << 19, kMostRehearsed = 1 << 21;
int64_t elements_of(const Conv2dProblem& p) { return p.x_numel() + p.y_numel(); }

// What the same kernel computes the same way.
using IsAlike = c10::function_ref<bool(const Conv2dProblem&)>;

// One axis with an output fewer for each that is not among the first `rows`.
bool cut_axis(int64_t& in, int64_t& out, int64_t stride, int64_t rows) {
  const int64_t left = in - (out - rows) * stride;
  if (rows == out || left < 1) return false;
  in = left, out = rows;
  return true;
}

// A part of a problem: fewer images, rows, columns, by halves.
Conv2dProblem part_of(const Conv2dProblem& problem, IsAlike is_alike) {
  Conv2dProblem part = problem;
  const auto shrink = [&](const auto& halve) {
    while (elements_of(part) > kRehearsed) {
      Conv2dProblem smaller = part;
      if (!halve(smaller) || !is_alike(smaller)) return;
      part = smaller;
    }
  };
  shrink([](Conv2dProblem& p) { return p.n > 1 ? (p.n = (p.n + 1) / 2, true) : false; });
  shrink([](Conv2dProblem& p) { return cut_axis(p.h, p.p, p.stride_h, (p.p + 1) / 2); });
  shrink([](Conv2dProblem& p) { return cut_axis(p.w, p.q, p.stride_w, (p.q + 1) / 2); });
  return part;
}

// The same with positions and channels that fill no tile, which another problem of the class may have: an odd number of
// positions, and eight channels of each group less or more, by which what they are multiples of does not change. Where each
// group has one channel, eight groups are.
Conv2dProblem ragged(const Conv2dProblem& problem, IsAlike is_alike) {
  Conv2dProblem found = problem;
  const auto changed = [&](const auto& change) {
    Conv2dProblem other = found;
    if (!change(other) || !is_alike(other)) return false;
    found = other;
    return true;
  };
  changed([](Conv2dProblem& p) { return p.n > 0 && p.n % 2 == 0 ? (--p.n, true) : false; });
  changed([](Conv2dProblem& p) { return cut_axis(p.h, p.p, p.stride_h, p.p - (p.p % 2 == 0)); });
  changed([](Conv2dProblem& p) { return cut_axis(p.w, p.q, p.stride_w, p.q - (p.q % 2 == 0)); });
  const auto either = [&](const auto& add, int64_t step) {
    const auto by = [&](int64_t more) { return [&, more](Conv2dProblem& p) { return add(p, more); }; };
    if (!changed(by(-step))) changed(by(step));
  };
  if (problem.groups > 1 && problem.c_per_group() == 1) {
    const int64_t multiplier = problem.k_per_group();
    either([=](Conv2dProblem& p, int64_t more) { return p.k += more * multiplier, (p.groups = p.c += more) > 1; }, 8);
    return found;
  }
  for (int64_t Conv2dProblem::* const channels : {&Conv2dProblem::c, &Conv2dProblem::k}) {
    either([=](Conv2dProblem& p, int64_t more) { return (p.*channels += more) > 0; }, 8 * problem.groups);
  }
  return found;
}

// The largest of the norms over `dims`: of every channel, if those are all others.
double largest_norm(const Tensor& of, double order, IntArrayRef dims) {
  return at::linalg_vector_norm(of, order, dims, /*keepdim=*/false, exact_type(of)).max().item<double>();
}

// No sum has terms whose sizes add up to more, by Hoelder's inequality: of a filter with the largest value, of two
// activations' channels with each other. Reads the caller's tensors and copies none.
double most_terms(const Conv2dStep& step) {
  const Conv2dProblem& p = step.problem;
  const Conv2dStep::Beside beside = step.beside ? step.beside() : Conv2dStep::Beside();
  if (step.op == Operator::wgrad) return largest_norm(step.on, 2, {0, 2, 3}) * largest_norm(step.by, 2, {0, 2, 3});
  const Tensor filters = step.by.unflatten(0, {p.groups, p.k_per_group()});
  const double filter =
      step.op == Operator::fprop ? largest_norm(filters, 1, {2, 3, 4}) : largest_norm(filters, 1, {1, 3, 4});
  return largest_in(step.on) * filter * beside.factor + beside.terms;
}

// What `text` means, which says that the results on the caller's tensors are apart. Where sums cancel, two right ways are,
// too: that tells nothing unless it is more than rounding may do. Sums cancel where the largest of them is less than what
// terms of random signs add up to, of which the mean square is the sum of squares, and this no less than the square of the
// sum of sizes by the number of terms.
std::string meaning_of(const std::string& text, const Conv2dStep& step, const Target& target, const Tensor& expected,
                       const Tensor& found) {
  const double terms = most_terms(step);
  const double of_random_signs = terms / std::sqrt(static_cast<double>(terms_of(step.op, step.problem)));
  if (largest_in(expected) >= of_random_signs) return text;
  const std::string apart = difference(expected, found, bound_on_cancelling(step, target), terms);
  return apart.empty() ? kUntold : apart;
}

}  // namespace

Contest conv2d(const Conv2dStep& step, const Selection& selection, Run run, Rehearse rehearse) {
  const auto faults_beside = [&step](const Tensor& own) { return step.faults ? step.faults(own) : std::string(); };
  const auto faults = [&step, &selection, run, rehearse, faults_beside]() -> std::string {
    const Backend candidate = *choices::candidate_on(step.on.device().type());
    const Target target = native::target_on(kernel_library(candidate), candidate);
    const auto type = step.on.scalar_type();
    const DType dtype = *native::dtype_of(type);
    const auto is_alike = [&](const Conv2dProblem& other) {
      const Selection s = select(step.op, other, dtype, target);
      return std::string_view(s.kernel) == selection.kernel && (s.split_k > 1) == (selection.split_k > 1);
    };
    const auto has_many_too = [&](const Conv2dProblem& other) {
      return is_alike(other) &&
             (select(step.op, other, dtype, target).split_k >= kManySlices) == (selection.split_k >= kManySlices);
    };
    const auto rehearsed = [&](const Conv2dProblem& part, bool is_biased) {
      const Tensor expected = rehearse(Backend::aten, {part, exact_type(step.on), is_biased});
      const Tensor found = rehearse(candidate, {part, type, is_biased});
      const std::string text = faults_beside(found);
      return text.empty() ? difference(expected, found, bound_on_integers(step)) : text;
    };
    Conv2dProblem part = part_of(step.problem, has_many_too);
    if (elements_of(part) > kMostRehearsed) part = part_of(step.problem, is_alike);
    const Conv2dProblem rest = ragged(part, is_alike);
    std::string text = rehearsed(part, true);
    if (text.empty()) text = rehearsed(rest, false);
    if (!text.empty()) return text;
    const Tensor found = run(candidate);  // first: what it converts is freed before there is a second result
    text = faults_beside(found);
    if (!text.empty()) return text;
    const Tensor expected = run(Backend::aten);
    text = difference(expected, found, bound_on_call(step, target));
    return text.empty() ? text : meaning_of(text, step, target, expected, found);
  };
  return {faults, [run](Backend on) { run(on); }};
}

}  // namespace freezekit::proof
