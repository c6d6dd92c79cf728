// What the drivers share: exact heap blocks, repeatable operands, comparisons, and what a launch reported.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/api.h"
#include "kernels/device.h"

extern "C" void freezekit_emulator_set_seed(unsigned);
extern "C" bool freezekit_emulator_set_cp_async(const char*);
extern "C" uint64_t freezekit_emulator_counter(const char*);

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
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return freezekit::cast<T>(static_cast<float>(value));
  }
}

template <class T>
double value_of(T v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    return freezekit::cast<float>(v);
  }
}

// A heap block of the exact size, so that a sanitizer sees the first byte beyond it, full of NaN to begin with.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count), data_(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data_), 0xff, bytes());
  }
  explicit Array(const std::vector<double>& values) : Array(values.size()) {
    for (size_t i = 0; i < count_; i++) data_[i] = rounded<T>(values[i]);
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  size_t count_;
  T* data_;
};

// The exit codes.
enum Outcome { kRight = 0, kWrong = 1, kUsage = 2, kLaunchFailed = 3, kBankConflicts = 4 };

inline int check_status(const char* what, Status status) {
  if (status == Status::success) return kRight;
  std::printf("launch failed: %s: %s: %s\n", what, freezekit::to_string(status), freezekit_last_error());
  return kLaunchFailed;
}

template <class T>
int compare(const char* what, const Array<T>& actual, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double wanted = value_of(rounded<T>(expected[i])), found = value_of(actual.data()[i]);
    if (found == wanted) continue;
    std::printf("wrong value: %s element %zu is %g, not %g\n", what, i, found, wanted);
    return kWrong;
  }
  return kRight;
}

inline int compare_mask(const char* what, const Array<uint32_t>& actual, const std::vector<uint32_t>& expected) {
  if (std::memcmp(actual.data(), expected.data(), actual.bytes()) == 0) return kRight;
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
      return f(freezekit::f16());
    case DType::bf16:
      return f(freezekit::bf16());
  }
  return kUsage;
}

}  // namespace driver
