// What arithmetic on elements of type T is done in: double for double, float for everything else.
#pragma once

#include <type_traits>

namespace freezekit::cpu {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace freezekit::cpu
