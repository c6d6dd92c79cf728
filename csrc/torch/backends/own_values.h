// Values that a proof computes on. They are its own: of a caller's batch that is all zeros, ones or of one sign, a kernel
// that is wrong elsewhere could not be told from one that is right.
//
// Nothing is drawn. A table is laid out again and again in memory order; its length is a prime, so that each value comes
// to each place of a vector, a word and a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <vector>

#include "core/problem.h"
#include "torch/common/operators.h"

namespace freezekit::proof {

// Both signs and both zeros, numbers that round, subnormal ones, the smallest and largest of the dtype, infinities, one
// NaN; the numbers of `around` with both neighbours. A row of `like`'s dtype, on its device.
Tensor special_values(const Tensor& like, std::initializer_list<double> around = {});
// Equal neighbours and negative numbers, one -infinity and no NaN: for maxima.
Tensor values_with_ties(const Tensor& like);

// A table, laid out again and again.
Tensor repeated(const Tensor& table, IntArrayRef size, at::MemoryFormat = at::MemoryFormat::Contiguous);

// Bits of masks: int32 words, half of the bits set.
Tensor mixed_bits(int64_t words, const Tensor& like);

// A convolution on integers from -2 to 2: products and sums of them are exact in every order, in tf32 and in float32.
// `like` is the caller's tensor that a result stands for, and its layout the result's.
struct Rehearsal {
  const Conv2dProblem& problem;
  at::ScalarType dtype;
  bool is_biased;  // of a plain convolution, whether its calls have a bias or not

  Geometry geometry(const Geometry& like) const;
  Tensor x(const Tensor& like) const;
  Tensor weight(const Tensor& like) const;
  Tensor y(const Tensor& like) const;
  std::vector<c10::SymInt> x_size() const;
  // One value per output channel: `table` in turn, on `like`'s device.
  Tensor per_channel(at::ScalarType type, const Tensor& like, std::vector<double> table = {-2, 1, 0, 2, -1}) const;
};

}  // namespace freezekit::proof
