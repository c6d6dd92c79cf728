// What a kernel is tried on before a class of problems is trusted to it.
//
// A class leaves open how many images, positions, channels and groups a problem has, and what a stride leaves over. These
// are what a kernel's loops and bounds go by. Problems that depend on the class alone, never on the call that comes
// first, take every loop through none but its first step and through more steps than it prefetches, every bound to where
// something is left over and, but for a sum's last step, to where nothing is:
//
//                   | first                                     | second
//   images          | three                                     | two
//   positions       | a whole tile and a part                   | a part of a tile
//   outputs         | a whole tile of channels and a part       | the same
//   groups          | three or more, or none                    | the same
//   reduction       | one step or two, not whole                | a ring of steps and more, not whole
//   wgrad's slices  | some of them empty                        | all full but the last
//   stride          | along w rows are left over, along h none  | the other way round
//   multiplier      | the least                                 | three times as much
//
// A dgrad's phases differ in size along an axis or are all equal; Hopper's have a map of the input for each pair of both, so
// that a third problem has phases that differ along both axes.
#pragma once

#include <vector>

#include "kernels/api.h"

namespace freezekit {

// Up to 8: by what a number of channels can be read in vectors.
inline int64_t channel_unit(int64_t channels) {
  const int64_t power = channels & -channels;
  return power < 8 ? power : 8;
}

// Whether a stride along an axis of this size leaves dgrad a single phase, as none does: other code than several.
inline bool is_one_phase(Operator op, int64_t size, int64_t stride) {
  return op == Operator::dgrad && size == 1 && stride > 1;
}

enum class Slices { one, several, many };
inline Slices slices_of(const Selection& s) {
  return s.split_k == 1 ? Slices::one : s.split_k < kManySlices ? Slices::several : Slices::many;
}

struct Rehearsed {
  Conv2dProblem problem;
  Selection selection;  // the same kernel, though select() might take another for so small a problem
};

// `by` is what select() gave for `like`.
std::vector<Rehearsed> rehearsals(Operator, const Conv2dProblem& like, DType, const Selection& by, const Target&);

}  // namespace freezekit
