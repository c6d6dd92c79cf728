#include "torch/backends/conv2d_proofs.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/rehearsals.h"
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
double rounding_of_sums(const Conv2dStep& step, const Conv2dProblem& of) {
  return 16 * epsilon_of(step) * (8 + std::sqrt(static_cast<double>(terms_of(step.op, of))));
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
  const double bound = std::max(rounding_of_sums(step, step.problem), rounding_of_values(step, target));
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
Bound bound_on_integers(const Conv2dStep& step, const Conv2dProblem& of) {
  constexpr double half = 0x1p-11, bfloat16 = 0x1p-8;
  const auto type = step.on.scalar_type();
  return {type == at::kHalf ? half : type == at::kBFloat16 ? bfloat16 : 0, rounding_of_sums(step, of)};
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
    bool is_biased = true;
    for (const Rehearsed& part : rehearsals(step.op, step.problem, dtype, selection, target)) {
      const Tensor expected = rehearse(Backend::aten, {part.problem, exact_type(step.on), is_biased});
      const native::SelectionScope scope(part.selection);
      const Tensor found = rehearse(candidate, {part.problem, type, is_biased});
      std::string text = faults_beside(found);
      if (text.empty()) text = difference(expected, found, bound_on_integers(step, part.problem));
      if (!text.empty()) return text;
      is_biased = false;
    }
    const Tensor found = run(candidate);  // first: what it converts is freed before there is a second result
    std::string text = faults_beside(found);
    if (!text.empty()) return text;
    const Tensor expected = run(Backend::aten);
    text = difference(expected, found, bound_on_call(step, target));
    return text.empty() ? text : meaning_of(text, step, target, expected, found);
  };
  return {faults, [run](Backend on) { run(on); }};
}

}  // namespace freezekit::proof
