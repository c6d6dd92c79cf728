// The tensors' element types: what each accumulates in, runs of eight of them, and the way from a DType to a type.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/device.h"

namespace freezekit {

// fp32 sums for everything up to fp32, fp64 for fp64.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Eight elements in 16-byte accesses; p is 16-byte aligned.
template <class T>
FK_DEVICE void load8(const T* p, T (&values)[8]) {
  constexpr int pieces = sizeof(values) / 16;
  uint4 raw[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) raw[i] = load_global(reinterpret_cast<const uint4*>(p) + i);
  memcpy(values, raw, sizeof(values));
}

template <class T>
FK_DEVICE void store8(T* p, const T (&values)[8]) {
  constexpr int pieces = sizeof(values) / 16;
  uint4 raw[pieces];
  memcpy(raw, values, sizeof(values));
#pragma unroll
  for (int i = 0; i < pieces; ++i) store_global(reinterpret_cast<uint4*>(p) + i, raw[i]);
}

inline bool is_aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>()) for the T of a DType; any other DType is an invalid argument.
template <class F>
Status dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(TypeTag<float>());
    case DType::f64:
      return f(TypeTag<double>());
    case DType::f16:
      return f(TypeTag<f16>());
    case DType::bf16:
      return f(TypeTag<bf16>());
  }
  return Status::invalid_argument;
}

// The same for the types that are summed in fp32; f64 is not supported.
template <class F>
Status dispatch_short_dtype(DType dtype, const F& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    if constexpr (std::is_same_v<typename decltype(tag)::type, double>) {
      return Status::unsupported;
    } else {
      return f(tag);
    }
  });
}

// f(std::integral_constant) of a config below kConfigs; any other is an invalid argument.
template <int kConfigs, class F>
Status dispatch_config(int config, const F& f) {
  if constexpr (kConfigs == 0) {
    return Status::invalid_argument;
  } else {
    if (config == kConfigs - 1) return f(std::integral_constant<int, kConfigs - 1>());
    return dispatch_config<kConfigs - 1>(config, f);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace freezekit
