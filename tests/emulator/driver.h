// What the drivers share: operands where kernels see them, repeatable values, comparisons, and what a launch reported.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/api.h"
#include "kernels/last_error.h"
#include "tests/emulator/platform.h"

namespace driver {

using freezekit::DType;
using freezekit::Status;

inline uint32_t random_state = 1;

inline int64_t random_below(int64_t bound) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int64_t>(random_state >> 8) % bound;
}

inline std::vector<double> random_integers(int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = static_cast<double>(random_below(5) - 2);
  return values;
}

// Multiples of 2^-20 in [-1, 1): their sums depend on the order in fp32.
inline std::vector<double> random_reals(int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = static_cast<double>(random_below(1 << 21)) * 0x1p-20 - 1.0;
  return values;
}

template <class T>
T rounded(double value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
double value_of(T v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(v);
  } else {
    return v;
  }
}

// An operand or a result: `data` is for kernels, `fetched` what they left there.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count), memory_(count * sizeof(T)) {}
  template <class Value>
  explicit Array(const std::vector<Value>& values) : Array(values.size()) {
    T* host = static_cast<T*>(memory_.of_host());
    for (size_t i = 0; i < count_; i++) {
      if constexpr (std::is_same_v<T, Value>) {
        host[i] = values[i];
      } else {
        host[i] = rounded<T>(values[i]);
      }
    }
    memory_.to_kernels();
  }
  T* data() const { return static_cast<T*>(memory_.of_kernels()); }
  const T* fetched() const {
    memory_.to_host();
    return static_cast<const T*>(memory_.of_host());
  }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  size_t count_;
  Memory memory_;
};

// The exit codes.
enum Outcome { kRight = 0, kWrong = 1, kUsage = 2, kLaunchFailed = 3, kBankConflicts = 4 };

inline int check_status(const char* what, Status status) {
  if (status == Status::success) return finish_kernels(), kRight;
  std::printf("launch failed: %s: %s: %s\n", what, freezekit::to_string(status), freezekit_last_error());
  return kLaunchFailed;
}

template <class T>
int compare(const char* what, const Array<T>& actual, const std::vector<double>& expected) {
  const T* values = actual.fetched();
  for (size_t i = 0; i < expected.size(); i++) {
    const double wanted = value_of(rounded<T>(expected[i])), found = value_of(values[i]);
    if (found == wanted) continue;
    std::printf("wrong value: %s element %zu is %g, not %g\n", what, i, found, wanted);
    return kWrong;
  }
  return kRight;
}

inline int compare_mask(const char* what, const Array<uint32_t>& actual, const std::vector<uint32_t>& expected) {
  if (std::memcmp(actual.fetched(), expected.data(), actual.bytes()) == 0) return kRight;
  std::printf("wrong mask: %s\n", what);
  return kWrong;
}

// f(T()) for the T of a dtype.
template <class F>
int with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::f64:
      return f(double());
    case DType::f16:
      return f(__half());
    case DType::bf16:
      return f(__nv_bfloat16());
  }
  return kUsage;
}

}  // namespace driver
