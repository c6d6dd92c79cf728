// Which of csrc/cpu's formats torch's 16-bit element types are.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/compute.h"

namespace freezekit::cpu {

template <>
inline constexpr Format kFormat<c10::BFloat16> = Format::bfloat16;
template <>
inline constexpr Format kFormat<c10::Half> = Format::float16;

}  // namespace freezekit::cpu
